"""Build student backbones and load teachers and earlier weights.

Imports the training configuration only, of distill.
"""
