"""Load batches, run optimisation steps on one device or several, and keep checkpoints.

Imports losses and below, of distill.
"""
