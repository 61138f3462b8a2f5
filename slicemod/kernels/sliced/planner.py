"""Makes the plan of the sliced kernel from the slices of a policy, with the bytes that the kernel will take."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from slicemod.call import AttentionShape
from slicemod.kernels.sliced import webui_policies
from slicemod.kernels.sliced.exact import exact, most_that_fits
from slicemod.kernels.sliced.slices import Conditions, Slices, balanced_rows
from slicemod.kernels.sliced.tiles import heads_of_slice, items_at_once
from slicemod.plan import SlicePlan, not_enough

POLICIES: dict[str, Callable[[AttentionShape, Conditions], Slices]] = {
    "exact": exact,
    "heuristic": webui_policies.heuristic,
    "doggettx": webui_policies.doggettx,
    "invokeai": webui_policies.invokeai,
    "mps": webui_policies.mps,
}


def plan_by_policy(shape: AttentionShape, given: Conditions, policy: str, steps: int | None = None) -> SlicePlan:
    """The plan that a policy decides, or the plan with the number of slices that the user gave.

    The policies of the webui do not know the true peak, so their plans may take more than the free bytes.

    Raises:
        NotEnoughMemoryError: the policy has no plan.
        ValueError: there is no policy with this name.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {policy!r}. Choose one of these.")
    plan = _plan(shape, given, policy, POLICIES[policy], steps)
    if given.free_bytes <= 0 < plan.peak_bytes:
        raise not_enough(policy, plan.peak_bytes, given.free_bytes, shape, 0, "Free memory on the device")
    return plan


@lru_cache(maxsize=4096)  # a UNet asks for the same plans in each step
def _plan(
    shape: AttentionShape,
    given: Conditions,
    policy: str,
    decide: Callable[[AttentionShape, Conditions], Slices],
    steps: int | None,
) -> SlicePlan:
    chosen = decide(shape, given) if steps is None else balanced_rows(shape, steps)
    axis, heads, rows, keys = chosen._replace(heads=heads_of_slice(shape, chosen.heads))
    items = items_at_once(shape, heads, rows)
    tiles = given.tiles(shape, heads, rows, items, keys)
    if items > 1:
        together = most_that_fits(items, lambda items: given.affords(given.tiles(shape, heads, rows, items, keys)))
        tiles = given.tiles(shape, heads, rows, max(1, together), keys)
    if not given.allows(tiles):  # then a turn of the loop computes only a part of a slice
        heads = most_that_fits(tiles.heads, lambda heads: given.allows(given.tiles(shape, heads, rows))) or 1
        rows = most_that_fits(rows, lambda rows: given.allows(given.tiles(shape, heads, rows))) or 1
        tiles = given.tiles(shape, heads, rows)
    return SlicePlan(
        axis=axis,
        steps=chosen.steps(shape),
        slice_size=chosen.rows if axis == "query" else heads_of_slice(shape, chosen.heads),
        peak_bytes=given.peak(tiles),
        kernel="math",
        policy=policy if steps is None else "pinned",
        heads=heads,
        rows=rows,
        items=tiles.items,
        keys=tiles.keys,
        checkpoint=given.checkpoint,
        upcast=tiles.shape.upcast,
    )
