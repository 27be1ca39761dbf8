"""Share what training, export and serving need: images, face sets, encoders, evidence, bundles.

Nothing here imports a web framework, and only ``distill`` and the ExecuTorch encoder import torch.
"""
