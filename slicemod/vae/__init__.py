"""A VAE's convolutions, a strip of rows at a time: the same picture, without the memory of whole layers."""
