"""`ClassEmbedder` by the path that configs name."""

from slicemod.training.digits.class_embedder import ClassEmbedder

__all__ = ["ClassEmbedder"]
