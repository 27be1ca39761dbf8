"""Define the results of an evaluation as they are written to disk. Imports nothing else of evaluation."""
