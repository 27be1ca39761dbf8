"""Hold what a browser is given: the page, the modules of the device in a browser, and onnxruntime-web.

It holds no Python but the line that says where it lies, and imports nothing of pkd; ``serving/api/pages.py`` serves it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder of the files: beside the code, also in an installed wheel."""
