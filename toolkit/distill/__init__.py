"""Train students into a teacher's embedding space.

The only folder, with export, whose code needs torch; imports encoders and below, never evaluation.
"""
