"""Read the published evaluation sets: LFW, CFP, InsightFace's .bin files, IJB. Imports metrics and results."""
