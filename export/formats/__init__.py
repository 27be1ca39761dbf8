"""Build the file of one runtime each; registry.py is the table of formats.

Imports checks and below, of export; the formats do not import each other.
"""
