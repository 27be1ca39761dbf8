"""Draw procedural faces that belong to nobody, for demo, tests and golden crops. Imports images and core."""
