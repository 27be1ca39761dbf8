"""Decide matches and keep galleries on behalf of requests, without HTTP. Imports inference and below, of serving."""
