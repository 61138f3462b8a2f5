"""`SampleQuality` by the path that configs name."""

from slicemod.training.stable_diffusion.sample_quality import SampleQuality

__all__ = ["SampleQuality"]
