"""Decode pictures and align faces to the crop that an encoder takes. Imports core only."""
