"""Projections in two halves of rows: the same bits, no more memory, and only where nobody could tell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.bench.memory import peak_memory
from slicemod.layers import projection as module
from slicemod.layers.projection import project

ROWS, WIDTH, OUT = 61, 48, 32


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """No size is known at first, and none is too small."""
    known: dict[Any, Any] = {}
    monkeypatch.setattr(module, "_known_sizes", known)
    monkeypatch.setattr(module, "_LEAST_PRODUCTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return known


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was computed in halves, which always are the faster ones."""
    shapes: list[torch.Size] = []
    in_halves = module._in_halves

    def recorded(linear: nn.Linear, x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return in_halves(linear, x)

    monkeypatch.setattr(module, "_in_halves", recorded)
    monkeypatch.setattr(module, "_measured", lambda linear, x: True)
    return shapes


@pytest.fixture
def inference() -> Iterator[None]:
    """Without gradients."""
    with torch.no_grad():
        yield


def plain(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)


def tokens(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, ROWS, WIDTH).to(dtype)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)], ids=str)
def test_halves_are_the_whole(lead: tuple[int, ...], bias: bool, dtype: torch.dtype, halved: list[torch.Size]) -> None:
    linear, x = plain(bias, dtype), torch.randn(*lead, ROWS, WIDTH).to(dtype)
    found, expected = project(linear, x), linear(x)
    assert halved == [x.shape]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("inference")
def test_one_row_has_no_second_half(halved: list[torch.Size]) -> None:
    linear, x = plain(), tokens()[:, :1]
    torch.testing.assert_close(project(linear, x), linear(x))
    assert halved == [x.shape]


@pytest.mark.usefixtures("inference")
def test_a_sequential_may_start_with_one(halved: list[torch.Size]) -> None:
    out, x = nn.Sequential(plain(), nn.Dropout(0.5)).eval(), tokens()
    torch.testing.assert_close(project(out, x), out(x))
    assert halved == [x.shape]


def hook(*_: Any) -> None:
    """Does nothing, but is there."""


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Twice the weight."""
        return 2 * weight


class Adapter(nn.Linear):
    """A linear layer of somebody else, as LoRA's are."""

    def forward(self, x: Tensor) -> Tensor:
        """Something more."""
        return super().forward(x) + 1


class Wrapped(Tensor):
    """A tensor of somebody else."""


def with_its_own_forward(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    vars(linear)["forward"] = lambda x: forward(x) + 1
    return linear


def with_hook(kind: str) -> Callable[[nn.Linear], nn.Linear]:
    def register(linear: nn.Linear) -> nn.Linear:
        getattr(linear, f"register_{kind}")(hook)
        return linear

    return register


def parametrized(linear: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


CHANGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "forward hook": with_hook("forward_hook"),
    "forward pre-hook": with_hook("forward_pre_hook"),
    "backward hook": with_hook("full_backward_hook"),
    "backward pre-hook": with_hook("full_backward_pre_hook"),
    "forward of its own": with_its_own_forward,
    "parametrization": parametrized,
    "subclass": lambda linear: Adapter(WIDTH, OUT, dtype=torch.bfloat16),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),  # type: ignore[no-untyped-call]
    "hook of a sequential": lambda linear: with_hook("forward_hook")(nn.Sequential(linear)),  # type: ignore[arg-type]
    "weight of another layout": lambda linear: _with_weight(linear, linear.weight.t().contiguous().t()),
    "weight of somebody else": lambda linear: _with_weight(linear, linear.weight.detach().as_subclass(Wrapped)),
}


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_module_that_is_more_than_a_product_is_called(
    change: Callable[[nn.Linear], nn.Module], halved: list[torch.Size]
) -> None:
    changed, x = change(plain()), tokens()
    assert torch.equal(project(changed, x), changed(x))
    assert halved == []


@pytest.mark.usefixtures("inference")
def test_a_hook_of_all_modules_is_called(halved: list[torch.Size]) -> None:
    linear, seen = plain(), []
    handle = register_module_forward_hook(lambda called, *_: seen.append(called))
    try:
        project(linear, tokens())
    finally:
        handle.remove()
    assert seen == [linear]
    assert halved == []


@pytest.mark.usefixtures("inference")
def test_a_forward_put_into_all_linear_layers_is_called(
    monkeypatch: pytest.MonkeyPatch, halved: list[torch.Size]
) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    linear, x = plain(), tokens()
    assert torch.equal(project(linear, x), linear(x))
    assert halved == []


def test_gradients_go_the_plain_way(halved: list[torch.Size]) -> None:
    linear, x = plain(), tokens()
    assert torch.autograd.grad(project(linear, x).sum(), linear.weight)[0].shape == linear.weight.shape
    frozen = plain().requires_grad_(False)
    assert project(frozen, tokens().requires_grad_()).requires_grad
    assert halved == []
    assert not project(frozen, tokens()).requires_grad
    assert len(halved) == 1


@pytest.mark.usefixtures("inference")
def test_other_dtypes_and_devices_go_the_plain_way(halved: list[torch.Size]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert project(plain(dtype=dtype), tokens(dtype)).dtype == dtype
    assert project(plain().to("meta"), tokens().to("meta")).is_meta
    with torch.autocast("cpu", torch.float16):
        assert project(plain(), tokens()).dtype == torch.float16
    assert halved == []


@pytest.mark.usefixtures("inference")
def test_who_looks_on_sees_the_plain_way(halved: list[torch.Size]) -> None:
    linear, x = plain(), tokens()
    torch.func.vmap(lambda one: project(linear, one))(x)
    torch.compile(project, backend="eager", fullgraph=True)(linear, x)
    with forward_ad.dual_level():
        project(linear, x)
    assert halved == []


@pytest.mark.usefixtures("inference")
def test_one_thread_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch, halved: list[torch.Size]) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    project(plain(), tokens())
    assert halved == []


@pytest.mark.usefixtures("inference")
def test_products_that_are_not_worth_it_or_take_long_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[Any, Any]
) -> None:
    products = ROWS * WIDTH * OUT
    for least, most in ((products + 1, 2 * products), (1, products - 1)):
        monkeypatch.setattr(module, "_LEAST_PRODUCTS", least)
        monkeypatch.setattr(module, "_MOST_PRODUCTS", most)
        project(plain(), tokens())
    assert sizes == {}


@pytest.mark.usefixtures("inference")
def test_no_more_sizes_are_known_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[Any, Any], halved: list[torch.Size]
) -> None:
    monkeypatch.setattr(module, "_MOST_KNOWN_SIZES", 3)
    for rows in range(1, 12):
        project(plain(), tokens()[:, :rows])
        assert 1 <= len(sizes) <= 3


class Clock:
    """A clock that says how long the whole and the halves have taken, in turns."""

    def __init__(self, whole: float, halves: float) -> None:
        self.now, self.asked, self.seconds = 0.0, 0, (0.0, whole, 0.0, halves)

    def __call__(self) -> float:
        """The time."""
        self.now += self.seconds[self.asked % 4]
        self.asked += 1
        return self.now


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies half precision by tiles."""
    monkeypatch.setattr(module, "cpu_products", lambda dtype: "tiles")


@pytest.mark.usefixtures("inference", "instructions")
@pytest.mark.parametrize(("halves", "faster"), [(0.5, True), (0.85, True), (0.95, False), (1.0, False), (2.0, False)])
def test_what_is_clearly_faster_is_measured_once_for_each_size(
    halves: float, faster: bool, monkeypatch: pytest.MonkeyPatch, sizes: dict[Any, Any]
) -> None:
    clock = Clock(1.0, halves)
    monkeypatch.setattr(module, "perf_counter", clock)
    monkeypatch.setattr(module, "_sums_of_bits", lambda output: (output.new_zeros(1), output.new_zeros(1)))
    for _ in range(3):
        project(plain(), tokens())
    assert list(sizes.values()) == [faster]
    asked = clock.asked
    project(plain(), tokens())
    assert clock.asked == asked
    project(plain(bias=False), tokens())
    assert clock.asked == 2 * asked


@pytest.mark.usefixtures("inference", "instructions")
def test_halves_with_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch, sizes: dict[Any, Any]) -> None:
    in_halves = module._in_halves

    def off_by_one_bit(linear: nn.Linear, x: Tensor) -> Tensor:
        output = in_halves(linear, x)
        output.view(torch.int16)[0, ROWS // 2, OUT // 2] ^= 1
        return output

    monkeypatch.setattr(module, "perf_counter", Clock(1.0, 0.1))
    monkeypatch.setattr(module, "_in_halves", off_by_one_bit)
    project(plain(), tokens())
    assert list(sizes.values()) == [False]


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("products", [None, "bfloat16"])
def test_a_processor_without_half_precision_or_with_vectors_of_it_is_not_measured(
    products: str | None, monkeypatch: pytest.MonkeyPatch, sizes: dict[Any, Any]
) -> None:
    monkeypatch.setattr(module, "cpu_products", lambda dtype: products)
    monkeypatch.setattr(module, "_in_halves", None)
    project(plain(), tokens())
    assert list(sizes.values()) == [False]


@pytest.mark.usefixtures("inference", "instructions")
@pytest.mark.parametrize("bias", [False, True])
def test_neither_halves_nor_measuring_take_more_memory_than_the_result_and_a_product(
    bias: bool, monkeypatch: pytest.MonkeyPatch, sizes: dict[Any, Any]
) -> None:
    linear, x = nn.Linear(640, 320, bias=bias, dtype=torch.bfloat16), torch.randn(1, 1021, 640).to(torch.bfloat16)
    monkeypatch.setattr(module, "perf_counter", Clock(1.0, 0.1))
    linear(x)
    result = 2 * 1021 * 320
    # What oneDNN takes besides differs from one processor to the next, and for the same product is never the same
    # as for half of it.
    whole, *halves = (peak_memory(partial(linear, rows)) for rows in (x, x[:, :511], x[:, 511:]))
    of_a_half = max(halves[0] - 2 * 511 * 320, halves[1] - 2 * 510 * 320)
    sums = 2 * 2 * (1021 + 320)
    assert peak_memory(lambda: project(linear, x)) <= result + max(whole - result, of_a_half) + 2 * sums
    assert len(sizes) == 1
    sizes.update(dict.fromkeys(sizes, True))
    assert peak_memory(lambda: project(linear, x)) <= result + of_a_half


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_takes_no_more_memory_than_the_module(bias: bool) -> None:
    """On this processor, measured as it is."""
    linear, x = nn.Linear(640, 320, bias=bias, dtype=torch.bfloat16), torch.randn(1, 1021, 640).to(torch.bfloat16)
    whole = peak_memory(lambda: linear(x))
    project(linear, x)
    assert peak_memory(lambda: project(linear, x)) <= whole


@pytest.mark.usefixtures("inference")
def test_a_layer_projects_in_halves_and_is_the_same_layer(halved: list[torch.Size]) -> None:
    layer = MemoryAwareCrossAttention(32, 48, heads=2, dim_head=16).to(torch.bfloat16).eval()
    hooked = copy.deepcopy(layer)
    for part in (hooked.to_q, hooked.to_k, hooked.to_v, hooked.to_out[0]):
        part.register_forward_hook(hook)
    x, context = torch.randn(2, 61, 32).to(torch.bfloat16), torch.randn(2, 53, 48).to(torch.bfloat16)
    found = layer(x, context)
    assert halved == [(2, 61, 32), (2, 53, 48), (2, 53, 48), (2, 61, 32)]
    torch.testing.assert_close(found, hooked(x, context))
    assert len(halved) == 4
