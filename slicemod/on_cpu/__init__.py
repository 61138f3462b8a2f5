"""Inference on a CPU: convolutions and linear layers by the means that this CPU is fastest with."""
