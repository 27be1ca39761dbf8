"""Run the whole product on a few hundred faces and show the result as one page.

Imports everything of the toolkit but cli.
"""
