"""What a plan promises is what the attention allocates, to within 5%, and never more."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.memory import peak_memory
from slicemod.math_kernel import attention_shape, attention_sizes
from slicemod.plan import plan_slices
from slicemod.shapes import Tiles
from slicemod.slice_config import SliceConfig
from slicemod.sliced import planned_attention, sliced_attention
from tests.oracle import Inputs, layer_inputs

SLICINGS: dict[str, SliceConfig] = {
    "one slice": SliceConfig(kernel="math", steps=1),
    "rows": SliceConfig(kernel="math", steps=3),
    "eight rows": SliceConfig(kernel="math", steps=17),
    "heads": SliceConfig(kernel="math", policy="exact", budget="1MiB"),
    "rows of single heads": SliceConfig(kernel="math", policy="exact", budget="200KiB"),
    "kept weights": SliceConfig(kernel="math", steps=5, checkpoint=False),
    "upcast": SliceConfig(kernel="math", steps=5, upcast=True),
    "fused": SliceConfig(kernel="fused"),
}


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Masks for 2 batch items, 6 heads, 131 queries and 113 keys."""
    return {
        "no mask": None,
        "bool": torch.rand(131, 113) > 0.3,
        "bool per item": torch.rand(2, 1, 1, 113) > 0.3,
        "additive": torch.randn(2, 1, 131, 113).to(dtype),
        "float32": torch.randn(131, 113),
        "gradient per head": torch.randn(1, 6, 1, 113).to(dtype).requires_grad_(),
        "gradient": torch.randn(131, 113).to(dtype).requires_grad_(),
    }


def size(tensors: Any) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def promise_and_peak(inputs: Inputs, slicing: SliceConfig | None, *, training: bool, **more: Any) -> tuple[int, int]:
    """What the plan says, and what was measured beyond the output and, in backward, the input gradients."""
    leaves = inputs.leaves()
    wanted = list(leaves.differentiable().values())

    def forward() -> Tensor:
        return leaves.run(sliced_attention, slicing=slicing, **more)

    def step() -> tuple[Any, ...]:
        output = forward()
        return output, torch.autograd.grad(output, wanted, grad_output)

    with torch.set_grad_enabled(training):
        plan = planned_attention(
            leaves.query, leaves.key, leaves.value, leaves.mask, **leaves.settings, slicing=slicing, **more
        )[1]
        assert plan is not None
        output = forward()
        grad_output = torch.ones_like(output)
        peak = peak_memory(forward) - size([output])
        if training:
            peak = max(peak, peak_memory(step) - size([output]) - size(wanted))
    return plan.peak_bytes, peak


def cases() -> Iterator[Any]:
    """Every way to slice with every dtype, and every mask with a third of these."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    names = [*masks(torch.float32), "causal"]
    for (i, slicing), (j, dtype), (k, mask) in itertools.product(
        enumerate(SLICINGS), enumerate(dtypes), enumerate(names)
    ):
        fusible = not mask.startswith("gradient") and (mask != "float32" or dtype == torch.float32)
        refused = mask == "float32" and dtype == torch.float64  # SDPA takes no narrower mask than query
        if (i + j + k) % 3 or refused or (slicing == "fused" and not fusible):
            continue
        yield pytest.param(slicing, dtype, mask, 2 if (j + k // 2) % 2 else None, id=f"{slicing}-{dtype}-{mask}")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("slicing", "dtype", "mask", "key_heads"), list(cases()))
def test_the_peak_is_what_the_plan_says(
    slicing: str, dtype: torch.dtype, mask: str, key_heads: int | None, training: bool
) -> None:
    sizes: dict[str, Any] = {"heads": 6, "queries": 131, "keys": 113, "key_heads": key_heads}
    if mask == "causal":
        inputs = layer_inputs(dtype, **sizes, is_causal=True)
    else:
        inputs = layer_inputs(dtype, **sizes, mask=masks(dtype)[mask])
    promised, peak = promise_and_peak(inputs, SLICINGS[slicing], training=training)
    assert 0.95 * promised <= peak <= promised


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("steps", [1, 3])
def test_dropout_is_in_the_plan(steps: int, training: bool) -> None:
    slicing = SliceConfig(kernel="math", steps=steps)
    inputs = layer_inputs(heads=6, queries=131, keys=113)
    promised, peak = promise_and_peak(inputs, slicing, training=training, dropout_p=0.3)
    assert 0.95 * promised <= peak <= promised + 8  # the seed


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("queries", [5, 31, 191, 193, 769])
def test_the_fused_kernels_peak_is_known_at_every_block_size(queries: int, training: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keys in (3, 611):
            inputs = layer_inputs(heads=5, queries=queries, keys=keys)
            promised, peak = promise_and_peak(inputs, SliceConfig(kernel="fused"), training=training)
            assert 0.95 * promised <= peak <= promised
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["layer", "column-major", "spaced", "one token", "one head"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_input_is_copied_whole(training: bool, layout: str) -> None:
    """Wide heads and short slices: a copy of one input would be several times the workspace."""
    inputs = layer_inputs(batch=5, heads=7, queries=131, keys=113, width=67)
    for name in ("query", "key", "value"):
        tensor = getattr(inputs, name)
        copies = {
            "layer": tensor,
            "column-major": tensor.mT.contiguous().mT,
            "spaced": tensor.repeat_interleave(2, -1)[..., ::2],
            "one token": tensor[..., :1, :].expand_as(tensor),
            "one head": tensor[:, :1].expand_as(tensor),
        }
        setattr(inputs, name, copies[layout])
    slicing = SliceConfig(kernel="math", policy="exact", budget="200KiB")
    promised, peak = promise_and_peak(inputs, slicing, training=training)
    assert 0.95 * promised <= peak <= promised <= 200 * 1024
    assert size([inputs.query]) > 5 * 200 * 1024


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("more_than_least", [0, 20_000])
@pytest.mark.parametrize("kind", ["none", "bool", "float32", "gradient", "causal", "dropout", "grouped", "spaced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_peak_of_key_chunks_is_what_the_plan_says(
    dtype: torch.dtype, kind: str, more_than_least: int, training: bool
) -> None:
    masks = {"bool": torch.rand(67, 1013) > 0.3, "float32": torch.randn(67, 1013)}
    masks["gradient"] = torch.randn(1, 1013).to(dtype).requires_grad_()
    heads, more = (4, {"key_heads": 2}) if kind == "grouped" else (3, {})
    inputs = layer_inputs(dtype, heads=heads, queries=67, keys=1013, mask=masks.get(kind), **more)
    if kind == "causal":
        inputs.settings["is_causal"] = True
    if kind == "spaced":
        inputs.key = inputs.key.repeat_interleave(2, -1)[..., ::2]
    dropout_p = 0.3 if kind == "dropout" else 0.0
    if more_than_least == 0:  # a score at a time takes many turns
        inputs.query, inputs.mask = inputs.query[:, :, :1], None
    sizes = attention_sizes(
        *(inputs.query, inputs.key, inputs.value, inputs.mask),
        dropout_p=dropout_p,
        is_causal=kind == "causal",
        upcast=dtype.itemsize < 4,
    )
    shape = attention_shape(sizes)
    least = Tiles.of_slice(shape, 1, 1, keys=1).peak(training=training)
    plan = plan_slices(shape, least + more_than_least, policy="exact", device_type="cpu", training=training)
    assert 0 < plan.keys < 1013
    promised, peak = promise_and_peak(inputs, None, plan=plan, training=training, dropout_p=dropout_p)
    assert 0.95 * promised <= peak <= promised <= least + more_than_least


@pytest.mark.parametrize("budget", ["200KiB", "2MiB"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_an_exact_budget_is_kept(budget: str, training: bool) -> None:
    slicing = SliceConfig(budget=budget, policy="exact")
    peak = promise_and_peak(layer_inputs(heads=6, queries=509, keys=499), slicing, training=training)[1]
    assert peak <= int(budget.removesuffix("KiB").removesuffix("MiB")) * (1024 if "K" in budget else 2**20)


def test_nothing_of_a_slice_outlives_it_when_checkpointed() -> None:
    inputs = layer_inputs(queries=509, keys=499).leaves()

    def saved(checkpoint: bool) -> int:
        stored: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            stored.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            inputs.run(sliced_attention, slicing=SliceConfig(kernel="math", steps=5, checkpoint=checkpoint))
        return size(stored) - size([inputs.query, inputs.key, inputs.value])

    assert saved(checkpoint=True) == 0
    assert saved(checkpoint=False) == 2 * 3 * 509 * 499 * 4


def layer_peak(layer: Callable[[Tensor], Tensor], x: Tensor, *, training: bool) -> int:
    def call() -> object:
        if not training:
            with torch.no_grad():
                return layer(x)
        output = layer(x)
        return output, torch.autograd.grad(output.sum(), x)

    call()
    return peak_memory(call)


@pytest.mark.parametrize("steps", [2, 16])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_compiled_peak_is_at_most_a_tenth_above_the_eager_one(training: bool, steps: int) -> None:
    torch._dynamo.reset()
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing=SliceConfig(kernel="math", steps=steps))
    x = torch.randn(2, 1009, 29, requires_grad=True)
    eager = layer_peak(layer, x, training=training)
    compiled = layer_peak(torch.compile(layer, fullgraph=True), x, training=training)
    assert 0 < compiled <= 1.1 * eager


PROGRAM = """
import resource, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from slicemod.sliced import sliced_attention
torch.set_num_threads(1)
torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 8, 4001, 40).unbind()  # full scores: 512 MB
small = [tensor[:, :, :67] for tensor in (query, key, value)]
sliced_attention(*small, slicing={"kernel": "math"})  # libraries allocate what they need once
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + 128 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
if sys.argv[1] == "sliced":
    output = sliced_attention(query, key, value, slicing={"budget": "32MiB", "policy": "exact", "kernel": "math"})
    expected = F.scaled_dot_product_attention(query, key, value)
    print("error", float((output - expected).norm() / expected.norm()))
else:
    torch.softmax(query @ key.mT, -1) @ value
    print("done")
"""


def under_a_limit(what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux only")
def test_sliced_attention_finishes_where_full_attention_runs_out_of_memory() -> None:
    full = under_a_limit("full")
    assert full.returncode != 0
    assert "can't allocate memory" in full.stderr or "not enough memory" in full.stderr
    sliced = under_a_limit("sliced")
    assert sliced.returncode == 0, sliced.stderr
    assert not math.isnan(float(sliced.stdout.split()[1]))
    assert float(sliced.stdout.split()[1]) < 1e-5
