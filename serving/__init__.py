"""Bundles over HTTP. Never imports torch."""
