"""`WarmUp` by the path that configs name."""

from slicemod.training.common.optimizers import WarmUp

__all__ = ["WarmUp"]
