"""Search templates exactly, in memory. Imports the gallery protocol and core."""
