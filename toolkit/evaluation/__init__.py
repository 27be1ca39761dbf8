"""Measure error rates of ordered encoder pairs with intervals, and report them.

Knows no torch; imports encoders and below, never distill.
"""
