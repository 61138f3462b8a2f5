"""`SampleImages` by the path that configs name."""

from slicemod.training.stable_diffusion.sample_images import SampleImages

__all__ = ["SampleImages"]
