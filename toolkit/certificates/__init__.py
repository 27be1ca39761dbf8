"""Describe measured error rates of an ordered pair of encoders, and sign files. Imports core, images and data."""
