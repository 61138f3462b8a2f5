"""Predicts the memory of a UNet's step and the plans of its attention, without its weights and without the device."""
