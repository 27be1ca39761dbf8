"""Turn request images into embeddings. Imports observability and below, of serving."""
