"""Compute the loss of every distillation method; registry.py is the table of methods.

Imports heads, models and config, of distill.
"""
