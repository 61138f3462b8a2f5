"""The sliced kernel: runs every call on every device, in as many slices as the memory requires."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from slicemod.call import AttentionShape, CallSpec, scale_of
from slicemod.kernels.kernel import Arguments, Inputs, Kernel, Terms
from slicemod.kernels.sliced.operators import attention
from slicemod.kernels.sliced.planner import plan_by_policy
from slicemod.kernels.sliced.slices import Conditions
from slicemod.kernels.sliced.transformed import transformed_attention
from slicemod.plan import NotEnoughMemoryError, SlicePlan, largest_square, not_enough
from slicemod.watched import is_transformed


class SlicedKernel(Kernel):
    """PyTorch's matrix products on one slice of rows or heads at a time, in one workspace that all slices use."""

    name: ClassVar[str] = "math"
    summary: ClassVar[str] = "matrix products of PyTorch's, in slices; takes every call on every device"
    takes_steps: ClassVar[bool] = True

    def obstacle(self, call: CallSpec) -> str | None:
        """None, because this kernel can run every call."""
        return None

    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan:
        """The plan that the policy decides.

        Raises:
            NotEnoughMemoryError: the policy has no plan, or its plan takes more than `free_bytes`.
        """
        shape = replace(call.shape, upcast=call.shape.upcast or terms.upcast)
        given = Conditions(max(0, free_bytes), call.device.type, call.training, terms.checkpoint)
        plan = plan_by_policy(shape, given, terms.policy, terms.steps)
        if plan.peak_bytes <= free_bytes:
            return plan

        def fits(shape: AttentionShape) -> bool:
            try:
                return plan_by_policy(shape, given, terms.policy, terms.steps).peak_bytes <= free_bytes
            except NotEnoughMemoryError:
                return False

        # The webui's policies do not know the true peak, and neither does a user who fixes the steps.
        advice = f"Leave steps={terms.steps} out" if terms.steps is not None else 'Take policy="exact"'
        side = largest_square(shape, fits)
        raise not_enough(f"the plan {plan}", plan.peak_bytes, free_bytes, shape, side, f"{advice}, raise the budget")

    def holds(self, plan: SlicePlan, call: CallSpec) -> bool:
        """Whether the tiles of its slices fit."""
        shape = replace(call.shape, upcast=plan.upcast)
        checkpoint = not _keeps_weights(plan, call.training)
        given = Conditions(plan.peak_bytes, call.device.type, call.training, checkpoint)
        return given.peak(given.tiles(shape, plan.heads, plan.rows, plan.items, plan.keys)) <= plan.peak_bytes

    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """One operator, forward and backward, whatever the number of slices."""
        query, key, value, mask = inputs
        seed = torch.randint(2**63 - 1, (), device="cpu") if more.dropout_p > 0 else None
        settings = more.dropout_p, more.is_causal, scale_of(query, more.scale), plan.upcast
        slices = plan.items, plan.heads, plan.rows, plan.keys
        if is_transformed():
            return transformed_attention(query, key, value, mask, seed, *settings, *slices)
        output: Tensor
        output, _ = attention(query, key, value, mask, seed, *settings, _keeps_weights(plan, more.training), *slices)
        return output

    def kept_bytes(self, call: CallSpec, plan: SlicePlan) -> int:
        """The weights, if the backward pass does not compute its slices again."""
        shape = replace(call.shape, upcast=plan.upcast)
        return shape.scores_bytes if _keeps_weights(plan, call.training) else 0


def _keeps_weights(plan: SlicePlan, training: bool) -> bool:
    return training and not plan.checkpoint and not plan.keys
