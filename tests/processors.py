"""Markers for what not every processor does in bearable time."""

from __future__ import annotations

import pytest
import torch

from slicemod.half_precision import cpu_products

# For tests of a whole UNet.
MULTIPLIES_BFLOAT16 = pytest.mark.skipif(
    cpu_products(torch.bfloat16) is None,
    reason="this processor does not multiply bfloat16, and a step of SD1.5 takes a quarter of an hour",
)
