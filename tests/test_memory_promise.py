"""What a plan promises is what the attention allocates, to within 5%, and never more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.memory import peak_memory
from slicemod.call import attention_shape, attention_sizes
from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.kernels.sliced.tiles import Tiles
from slicemod.plan import SlicePlan
from tests.oracle import Inputs, layer_inputs
from tests.pairwise import pairwise

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
        "float32, gradient": torch.randn(131, 113).requires_grad_(),
        "float32, gradient per head": torch.randn(1, 6, 1, 113).requires_grad_(),
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
        peak = peak_memory(forward, output.device) - size([output])
        if training:
            peak = max(peak, peak_memory(step, output.device) - size([output]) - size(wanted))
    return plan.peak_bytes, peak


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MATH = [name for name in SLICINGS if name != "fused"]
OF_FLOAT32 = [name for name in masks(torch.float32) if name.startswith("float32")]
OF_THE_SAME_DTYPE = [name for name in masks(torch.float32) if name not in OF_FLOAT32] + ["causal"]
FUSIBLE = [name for name in OF_THE_SAME_DTYPE if not name.startswith("gradient")]
REST: tuple[Any, ...] = [None, 2], [False, True]  # heads of keys; whether gradients are computed


@pytest.mark.parametrize(
    ("slicing", "dtype", "mask", "key_heads", "training"),
    [
        *pairwise(MATH, DTYPES, OF_THE_SAME_DTYPE, *REST),
        *pairwise(MATH, DTYPES, OF_FLOAT32, *REST),
        *pairwise(["fused"], DTYPES, FUSIBLE, *REST),
        *pairwise(["fused"], DTYPES[:1], ["float32"], *REST),
    ],
    ids=str,
)
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


@pytest.mark.parametrize(
    ("dtype", "chunk", "kind", "training"),
    pairwise(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        [(16, 29), (1, 1)],
        ["none", "bool", "float32", "gradient", "float32, gradient", "causal", "dropout", "grouped", "spaced"],
        [False, True],
    ),
    ids=str,
)
def test_the_peak_of_key_chunks_is_what_the_plan_says(
    dtype: torch.dtype, chunk: tuple[int, int], kind: str, training: bool
) -> None:
    rows, keys = chunk
    queries, all_keys = (37, 61) if rows > 1 else (1, 7)  # a score at a time takes many turns
    masks = {"bool": torch.rand(1, 1, queries, all_keys) > 0.3, "float32": torch.randn(1, 1, queries, all_keys)}
    masks["gradient"] = torch.randn(1, 1, 1, all_keys).to(dtype).requires_grad_()
    masks["float32, gradient"] = torch.randn(1, 1, queries, all_keys).requires_grad_()
    heads, key_heads = (4, 2) if kind == "grouped" else (3, None)
    inputs = layer_inputs(
        dtype,
        batch=1,
        heads=heads,
        queries=queries,
        keys=all_keys,
        width=31,
        key_heads=key_heads,
        mask=masks.get(kind),
    )
    if kind == "causal":
        inputs.settings["is_causal"] = True
    if kind == "spaced":
        inputs.key = inputs.key.repeat_interleave(2, -1)[..., ::2]
    dropout_p = 0.3 if kind == "dropout" else 0.0
    with torch.set_grad_enabled(training):
        sizes = attention_sizes(
            *(inputs.query, inputs.key, inputs.value, inputs.mask),
            dropout_p=dropout_p,
            is_causal=kind == "causal",
            upcast=dtype.itemsize < 4,
        )
    tiles = Tiles.of_slice(attention_shape(sizes), 1, rows, keys=keys)
    peak_bytes, upcast = tiles.peak(training=training), tiles.shape.upcast
    plan = SlicePlan("query", 1, rows, peak_bytes, "math", "test", 1, rows, upcast=upcast, keys=keys)
    promised, peak = promise_and_peak(inputs, None, plan=plan, training=training, dropout_p=dropout_p)
    assert 0.95 * promised <= peak <= promised == peak_bytes


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


@pytest.mark.parametrize("steps", [2, pytest.param(16, marks=pytest.mark.slow)])
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
from slicemod import SliceConfig, sliced_attention
from slicemod.reference import reference_attention
torch.set_num_threads(1)
torch.manual_seed(0)
training, budget = sys.argv[1] == "training", int(sys.argv[2]) * 2**20
tokens = 9001  # full scores: 309 MiB a head
query, key, value, grad = torch.randn(4, 1, 1, tokens, 8).unbind()
slicing = SliceConfig(budget=budget, policy="exact", kernel="math")
leaves = [tensor.requires_grad_(training) for tensor in (query, key, value)]

def step(attention, count=tokens):
    parts = [tensor[:, :, :count] for tensor in leaves]
    output = attention(*parts)
    return [output, *(torch.autograd.grad(output, leaves, grad[:, :, :count]) if training else [])]

def sliced(*parts):
    return sliced_attention(*parts, slicing=slicing)

def full(query, key, value):
    return torch.softmax(query @ key.mT / 8**0.5, -1) @ value

for attention in (sliced, full):
    step(attention, 61)  # libraries allocate what they need once
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
results = 4 * query.nbytes  # the output and three gradients
limit = taken + results + budget + 48 * 2**20  # and what threads, Python and autograd take
assert limit - taken < tokens * tokens * 4 / 4
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
try:
    step(full)
except RuntimeError as error:
    print("full attention:", error)
else:
    raise SystemExit("full attention has room")
output, *grads = step(sliced)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

rows = slice(0, None, 61)
double = [tensor.detach().double() for tensor in leaves]
exact = reference_attention(double[0][:, :, rows], *double[1:])
print("output", float((output[:, :, rows] - exact).norm() / exact.norm()))
if training:
    # Of all queries for some keys: their columns of the weights are known from the log-sum-exp of the rows.
    q, k, v, g = (tensor[0, 0] for tensor in (*double, grad.double()))
    some_keys = k[rows], v[rows]
    sums = [torch.zeros_like(tensor) for tensor in some_keys]
    query_error = query_norm = 0.0
    for part in torch.arange(tokens).split(128):
        weights = torch.softmax(q[part] @ k.T / 8**0.5, -1)
        grad_weights = g[part] @ v.T
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) / 8**0.5
        sums[0] += grad_scores[:, rows].T @ q[part]
        sums[1] += weights[:, rows].T @ g[part]
        grad_query = grad_scores @ k
        query_error += float((grads[0][0, 0, part] - grad_query).square().sum())
        query_norm += float(grad_query.square().sum())
    print("query", (query_error / query_norm) ** 0.5)
    for name, ours, exact in zip(("key", "value"), grads[1:], sums):
        print(name, float((ours[0, 0, rows] - exact).norm() / exact.norm()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux only")
@pytest.mark.parametrize("budget", [1, pytest.param(16, marks=pytest.mark.slow)], ids=["key chunks", "rows"])
@pytest.mark.parametrize("what", [pytest.param("inference", marks=pytest.mark.slow), "training"])
def test_sliced_attention_finishes_where_full_attention_runs_out_of_memory(what: str, budget: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(budget)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    refusal, *errors = ran.stdout.splitlines()
    assert "can't allocate memory" in refusal
    assert len(errors) == (4 if what == "training" else 1)
    assert all(float(line.split()[1]) < 1e-5 for line in errors), ran.stdout
