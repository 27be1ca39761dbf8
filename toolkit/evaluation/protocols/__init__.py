"""Run an evaluation protocol on a set of encoders. Imports everything of evaluation but report."""
