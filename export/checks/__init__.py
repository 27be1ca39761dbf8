"""Compare what was built with what was meant: parity, accuracy gate, speed, certificates.

Imports graph and quantization, of export.
"""
