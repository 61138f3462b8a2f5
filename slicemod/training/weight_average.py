"""`WeightAverage` by the path that configs name."""

from slicemod.training.common.weight_average import WeightAverage

__all__ = ["WeightAverage"]
