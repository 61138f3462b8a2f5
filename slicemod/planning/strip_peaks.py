"""The peak of an autoencoder that `swap_vae` has swapped, whose layers go through a strip of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from slicemod.adapters.vae import describe
from slicemod.plan import NotEnoughMemoryError
from slicemod.planning.autoencoders import AutoencoderSource
from slicemod.vae.plan import Convolving, LayerSizes, StripPlan, plan_strips
from slicemod.vae.running import sizes

_LEAST_BUDGET = 2**16  # bytes, below which no strips are tried


class StripBudget(NamedTuple):
    """A budget for strips, and the plan that it gives."""

    budget: int
    plan: StripPlan


def strip_layers(source: AutoencoderSource, dtype: torch.dtype) -> tuple[LayerSizes, ...]:
    """The layers of the half that the step runs, in order; none if `swap_vae` would not swap it."""
    model = source.model(dtype)
    if source.class_name != "AutoencoderKL":
        return ()
    try:
        layers = describe(model.encoder if source.encodes else model.decoder)
    except ValueError:  # a part that slicemod does not know
        return ()
    return tuple(LayerSizes(*layer) for layer in sizes(layers))


def strips_within(
    layers: Sequence[LayerSizes], image: tuple[int, int, int], convolving: Convolving, memory: int
) -> StripBudget | None:
    """The tallest strips with which all activations fit `memory` bytes; None if none do.

    Args:
        layers: of `strip_layers`.
        image: items, height and width of the input.
        convolving: dtype and device.
        memory: for activations, the strips among them.
    """
    budget = memory
    while budget >= _LEAST_BUDGET:
        try:
            plan = plan_strips(layers, image, convolving, budget)
        except NotEnoughMemoryError:
            return None
        if plan.peak_bytes <= memory:
            return StripBudget(budget, plan)
        # Strips take less than their budget; what the rest takes does not depend on it.
        budget = min(budget // 2, plan.strip_bytes // 2)
    return None
