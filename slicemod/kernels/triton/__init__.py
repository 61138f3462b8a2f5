"""Attention in Triton, for NVIDIA's GPUs from Ampere on and AMD's CDNA.

`present.py` says whether a machine can run it, `launches.py` starts the kernels of `device/` in the tiles of
`tile_sizes.py`, and `operators.py` makes PyTorch operators of them. Only `device/` imports Triton when it is imported.
"""
