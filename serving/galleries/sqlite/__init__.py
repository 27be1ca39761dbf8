"""Keep galleries in one SQLite file. Imports galleries and index, never milvus."""
