"""Hold what every other folder uses: errors, records, command plumbing, the identity of encoders, preprocessing.

Imports nothing of pkd outside this folder.
"""
