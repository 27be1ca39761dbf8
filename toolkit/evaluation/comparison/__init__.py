"""Turn measurements into certificates, and rank several evaluations. Imports metrics, datasets and results."""
