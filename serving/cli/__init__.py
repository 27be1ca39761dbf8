"""Turn command lines into calls: pkd-serve, pkd-enroll, pkd-gallery.

Imports everything of serving; nothing imports it.
"""
