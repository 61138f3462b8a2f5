"""Ahead of time: the memory of a UNet's step and the plans of its attention, without its weights or its device."""
