"""Read, check and write bundles, the form in which an encoder is shipped.

Imports what lies below: core to certificates.
"""
