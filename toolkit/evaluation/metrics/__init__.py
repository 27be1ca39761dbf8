"""Compute scores, error rates, searches and their bootstrap intervals from embeddings and labels. Imports results."""
