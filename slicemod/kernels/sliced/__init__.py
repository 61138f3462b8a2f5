"""The sliced kernel: a policy chooses `Slices`, `planner.py` plans them, `loop.py` or `chunks.py` follows the plan."""
