"""Check what a device computes, from photograph to request, step by step. Imports synthetic and below, never cli."""
