"""Render results as one-file HTML pages and plots. Imports everything of evaluation."""
