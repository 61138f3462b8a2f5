"""`LastCheckpoint` by the path that configs name."""

from slicemod.training.common.last_checkpoint import LastCheckpoint

__all__ = ["LastCheckpoint"]
