"""Hold what every part of the server uses: problems, options, wire schemas, the encoding of embeddings.

Imports nothing else of serving.
"""
