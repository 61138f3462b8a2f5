"""What one attention call allocates, as the memory promise counts it."""

from __future__ import annotations

import torch

from slicemod.bench.memory import peak_memory
from tests.oracle import Attention, Inputs


def measured_peak(inputs: Inputs, attention: Attention, *, training: bool) -> int:
    """Peak bytes beyond inputs, output and, in training, input gradients."""
    leaves = inputs.leaves()
    wanted = [leaves.query, leaves.key, leaves.value]
    with torch.set_grad_enabled(training):
        output = leaves.run(attention)
        grad = torch.ones_like(output)
        peak = peak_memory(lambda: leaves.run(attention)) - output.nbytes
        if training:
            step = peak_memory(lambda: torch.autograd.grad(leaves.run(attention), wanted, grad))
            peak = max(peak, step - output.nbytes - sum(tensor.nbytes for tensor in wanted))
    return peak
