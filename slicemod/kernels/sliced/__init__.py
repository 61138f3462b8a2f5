"""The sliced kernel: policies make `Slices`, `planner.py` a plan of them, `loop.py` and `chunks.py` follow it."""
