"""Run the application in one process or several. Imports api and below, of serving."""
