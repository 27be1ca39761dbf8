"""Call a running server from Python. Imports core only, of serving."""

from pkd.serving.client.client import Client, Embedding, Enrolled, Item, vectors
from pkd.serving.client.connection import Refused, Unreachable

__all__ = ["Client", "Embedding", "Enrolled", "Item", "Refused", "Unreachable", "vectors"]
