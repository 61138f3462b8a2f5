"""Predicts the memory of a picture and of each of its parts, without their weights and without the device."""
