"""Bring small face encoders into a large teacher's embedding space, export them, and serve both.

`pkd.toolkit`, `pkd.export` and `pkd.serving` are the folders of these names beside this one, linked here.
"""

__version__ = "0.2.0"
