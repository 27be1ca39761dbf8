"""Speak HTTP: the application, its middleware, keys, OpenAPI and routes. Imports matching and below, of serving."""
