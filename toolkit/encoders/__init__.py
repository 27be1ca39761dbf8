"""Run encoders and face detectors in every runtime, and cache embeddings of whole face sets.

Imports bundle and below; the runtimes do not import each other.
"""
