"""What devices can multiply: the sliced kernel as it runs on Metal, and with half precision widened, simulated here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod.bench.memory import peak_memory
from slicemod.call import AttentionShape, attention_shape, attention_sizes
from slicemod.choose import plan_slices
from slicemod.kernels.sliced.chunks import chunked_backward, chunked_forward
from slicemod.kernels.sliced.loop import SlicedCall, math_backward, math_forward
from slicemod.kernels.sliced.planner import POLICIES
from slicemod.kernels.sliced.products import PLAIN, Products, products_of
from slicemod.kernels.sliced.tiles import Tiles
from slicemod.plan import NotEnoughMemoryError, SlicePlan
from slicemod.reference import reference_attention
from slicemod.torch_internals import TorchDispatchMode
from tests.oracle import Inputs, layer_inputs

GIB = 2**30
METAL = products_of("mps", 4, 40)
FEW_TERMS = 17  # so that sums over 53 keys, and over 3 x 23 rows, are made of several
NO_MASK = (True, True, True, False)


class NotedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the products: the operator, whether its result is contiguous, and how many terms it sums."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, bool, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("bmm", "baddbmm", "baddbmm_"):
            left = args[0] if name == "bmm" else args[1]
            out = kwargs.get("out", args[0])
            self.seen.append((name, out.is_contiguous(), left.shape[2]))
        return func(*args, **kwargs)


def both_passes(inputs: Inputs, call: SlicedCall) -> tuple[Tensor, ...]:
    """The output, and the gradients for a gradient of ones."""
    tensors = inputs.query, inputs.key, inputs.value, inputs.mask
    needs = (True, True, True, inputs.mask is not None)
    grad = torch.ones(*inputs.query.shape[:3], inputs.value.shape[3], dtype=inputs.query.dtype)
    if call.keys:
        output, _ = chunked_forward(*tensors, call)
        return output, *chunked_backward(grad, *tensors, call, needs)
    output, kept = math_forward(*tensors, call, keep_weights=False)
    return output, *math_backward(grad, *tensors, kept, call, needs)


CALLS = {"rows": (6, 23, 0), "heads": (2, 61, 0), "chunks": (6, 23, 29), "a head's chunks": (1, 23, 19)}


@pytest.mark.parametrize("kind", ["no mask", "gradient", "shared keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("slices", CALLS)
def test_on_metal_no_product_is_added_to_a_view_and_none_sums_too_many_terms(
    slices: str, dtype: torch.dtype, kind: str
) -> None:
    mask = torch.randn(6, 61, 53).to(dtype).unsqueeze(0) if kind == "gradient" else None
    inputs = layer_inputs(dtype, heads=6, queries=61, keys=53, key_heads=2 if kind == "shared keys" else None)
    inputs.mask = mask
    if mask is not None:
        mask.requires_grad_()
    heads, rows, keys = CALLS[slices]
    scale = inputs.query.shape[3] ** -0.5
    call = SlicedCall(0.0, False, scale, False, heads, rows, None, keys=keys)
    simulated = SlicedCall(**{**vars(call), "products": METAL._replace(most_terms=FEW_TERMS)})
    with torch.no_grad(), NotedProducts() as products:
        found = both_passes(inputs, simulated)
    assert {name for name, _, _ in products.seen} == {"bmm"}
    assert max(terms for _, _, terms in products.seen) <= FEW_TERMS
    with torch.no_grad():
        expected = both_passes(inputs, SlicedCall(**{**vars(call), "products": PLAIN}))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_elsewhere_products_are_added_where_they_belong() -> None:
    inputs = layer_inputs(torch.float32, heads=6, queries=61, keys=53)
    with torch.no_grad(), NotedProducts() as products:
        both_passes(inputs, SlicedCall(0.0, False, 0.3, False, 6, 23, None))
    assert ("baddbmm_", False, 23) in products.seen


@pytest.mark.parametrize(("keys", "training"), [(0, False), (0, True), (29, False), (29, True)])
def test_the_plan_counts_the_tile_that_products_go_through(keys: int, training: bool) -> None:
    shape = AttentionShape(2, 6, 61, 53, 11, 4)
    here, there = (Tiles.of_slice(shape, 6, 23, keys=keys, products=products) for products in (PLAIN, METAL))
    of_a_turn, of_keys = 6 * 23 * 11, 6 * (keys or 53) * 11
    expected = max(of_a_turn, of_keys) if training else of_a_turn if keys else 0
    added = there.peak(training=training) - here.peak(training=training)
    assert 0 <= added - 4 * expected < 4 * 16  # tiles start at lines


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("pixels", [1024, 1536, 2048])
def test_no_policy_has_more_scores_at_a_time_than_metal_counts(pixels: int, policy: str, checkpoint: bool) -> None:
    queries = (pixels // 8) ** 2
    for shape in (AttentionShape(1, 8, queries, queries, 40, 2), AttentionShape(2, 20, queries, 77, 64, 2)):
        settings: dict[str, Any] = {"policy": policy, "training": not checkpoint, "checkpoint": checkpoint}
        try:
            plan = plan_slices(shape, 1000 * GIB, device_type="mps", **settings)
        except NotEnoughMemoryError:
            assert not checkpoint  # the weights that are kept are too many
            continue
        assert plan.heads * plan.rows * (plan.keys or shape.keys) <= 2**30


def test_the_steps_of_the_webuis_policies_are_theirs_whatever_a_turn_computes() -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 2)  # its scores are 2**31, in 4 GiB
    there, here = (
        plan_slices(shape, 1000 * GIB, policy="doggettx", device_type=device_type) for device_type in ("mps", "cuda")
    )
    assert (there.steps, there.slice_size) == (here.steps, here.slice_size) == (1, 16384)
    assert there.heads * there.rows * 16384 <= 2**30 < here.heads * here.rows * 16384


def widened(left: Tensor, right: Tensor, out: Tensor) -> None:
    """What `torch.bmm(..., out_dtype=torch.float32)` computes on CUDA."""
    assert left.dtype == right.dtype != out.dtype
    WIDENED.append((left.shape, right.shape))
    torch.bmm(left.float(), right.float(), out=out)


WIDENED: list[tuple[torch.Size, torch.Size]] = []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"mask": torch.randn(1, 6, 61, 53)}])
def test_half_precision_is_multiplied_as_it_is_where_the_device_widens(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    WIDENED.clear()
    mask = settings.get("mask")
    inputs = layer_inputs(dtype, heads=6, queries=61, keys=53, **{k: v for k, v in settings.items() if k != "mask"})
    inputs.mask = None if mask is None else mask.to(dtype)
    scale = inputs.query.shape[3] ** -0.5
    call = SlicedCall(0.0, bool(settings.get("is_causal")), scale, True, 6, 23, None, keys=29)
    tensors = inputs.query, inputs.key, inputs.value, inputs.mask
    with torch.no_grad(), NotedProducts() as products:
        found, _ = chunked_forward(*tensors, SlicedCall(**{**vars(call), "products": Products(widened)}))
    turns = 2 * 3 * 2  # items, rows, chunks
    assert len(WIDENED) == 2 * turns
    assert {name for name, _, _ in products.seen} == {"bmm"}  # those of the simulation
    assert len(products.seen) == 2 * turns
    with torch.no_grad():
        theirs, _ = chunked_forward(*tensors, SlicedCall(**{**vars(call), "products": PLAIN}))
    exact = inputs.run(reference_attention)
    rounding = torch.finfo(dtype).eps
    assert (found.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + rounding


def test_a_widened_pass_has_no_copies_of_keys_and_values_and_the_plan_follows() -> None:
    shape = AttentionShape(1, 8, 4096, 4096, 80, 2, upcast=True)
    copied, in_place = (
        Tiles.of_slice(shape, 8, 1024, keys=1024, products=products) for products in (PLAIN, Products(widened))
    )
    assert {"key", "value"} <= set(copied.forward)
    assert not {"key", "value"} & set(in_place.forward)
    assert in_place.forward["rounded"] == 8 * 1024 * 1024 // 2
    assert in_place.forward["query"] == copied.forward["query"] // 2
    assert copied.backward == in_place.backward  # gradients are not rounded
    plan = plan_slices(shape, GIB)
    tiles = Tiles.of_slice(shape, 8, plan.rows, keys=plan.keys, products=products_of("cuda", 2, 80))
    assert tiles.widens
    assert plan.peak_bytes == tiles.peak(training=False)


@pytest.mark.parametrize(
    "more", [{"key_heads": 2}, {"irregular": True}, {"itemsize": 4, "upcast": False}], ids=["shared", "odd", "single"]
)
def test_what_cannot_be_multiplied_in_place_is_copied(more: dict[str, Any]) -> None:
    settings = {"itemsize": 2, "upcast": True} | more
    shape = AttentionShape(1, 8, 512, 512, 80, **settings)
    assert not Tiles.of_slice(shape, 8, 256, keys=256, products=Products(widened)).widens


@pytest.mark.parametrize(
    ("device_type", "itemsize", "head_dim", "widens"),
    [
        ("cuda", 2, 80, True),
        ("cuda", 2, 64, False),
        ("cuda", 4, 80, False),
        ("cpu", 2, 80, False),
        ("xpu", 2, 80, False),
    ],
)
def test_products_are_widened_on_cuda_for_wide_heads(
    device_type: str, itemsize: int, head_dim: int, widens: bool
) -> None:
    assert (products_of(device_type, itemsize, head_dim).widened is not None) == widens


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("device_type", ["cuda", "mps", "xpu"])
def test_stable_diffusion_at_1024_pixels_takes_256_turns_in_square_chunks(device_type: str, training: bool) -> None:
    shape = AttentionShape(1, 8, 16384, 16384, 40, 2, upcast=device_type == "cuda")
    plan: SlicePlan = plan_slices(shape, 64 * GIB, device_type=device_type, training=training)
    assert (plan.heads, plan.rows, plan.keys, plan.steps) == (8, 1024, 1024, 256)
    sums = 2 * 8 * 16384 * 40 * 4 if training else 0  # the gradients of keys and values
    scores = 8 * 1024 * 1024 * 4
    assert plan.peak_bytes - sums < (2.4 if training else 1.2) * scores + 2**20
    if device_type == "cuda" and not training:
        assert round(plan.peak_bytes / 2**20) == 37


@pytest.mark.parametrize("keys", [0, 127])
@pytest.mark.parametrize("products", [METAL._replace(most_terms=67), Products(widened)], ids=["metal", "widened"])
def test_a_pass_takes_what_its_tiles_count(products: Products, keys: int) -> None:
    dtype = torch.float32 if products.widened is None else torch.bfloat16
    inputs = layer_inputs(dtype, heads=6, queries=509, keys=503, width=24)
    tensors = inputs.query, inputs.key, inputs.value, None
    call = SlicedCall(0.0, False, 0.3, True, 6, 131, None, keys=keys, products=products)
    sizes = attention_sizes(*tensors, dropout_p=0.0, is_causal=False, upcast=True)
    tiles = Tiles.of_slice(attention_shape(sizes), 6, 131, keys=keys, products=products)
    grad = torch.ones_like(inputs.query)

    def forward() -> object:
        run = chunked_forward(*tensors, call) if keys else math_forward(*tensors, call, keep_weights=False)
        return run[0]

    def backward() -> object:
        if keys:
            return chunked_backward(grad, *tensors, call, NO_MASK)
        return math_backward(grad, *tensors, torch.empty(0), call, NO_MASK)

    with torch.no_grad():
        for run, returned, training in (
            (forward, inputs.query.nbytes, False),
            (backward, 3 * inputs.query.nbytes, True),
        ):
            beyond = peak_memory(run) - returned
            simulated = 4 * 2 * 6 * 503 * 24 if products.widened is not None else 0  # float32 copies of its operands
            assert tiles.peak(training=training) * 0.95 <= beyond <= tiles.peak(training=training) + simulated
