"""Choose INT8 ranges from calibration images and quantise graphs. Imports nothing else of export."""
