"""What training, export and serving share. Nothing here imports torch or a web framework; only ``distill`` does."""
