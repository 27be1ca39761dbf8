"""Read sets of face images from folders, lists, RecordIO and tar files, and keep rows computed from them.

Imports core and images.
"""
