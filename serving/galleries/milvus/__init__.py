"""Keep galleries in Milvus. Imports galleries, never sqlite."""
