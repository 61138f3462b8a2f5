"""Products in two halves of rows: the same result, no more memory, and only for sizes where they are faster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.layers.halves import Halves, are_faster, in_halves
from slicemod.layers.projection import project

ROWS, WIDTH, OUT = 61, 48, 32


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads, and no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def plain(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)


def tokens(rows: int = ROWS) -> Tensor:
    return torch.randn(1, rows, WIDTH).to(torch.bfloat16)


def by_tiles(dtype: torch.dtype) -> str:
    """A processor that multiplies half precision by tiles."""
    return "tiles"


class Clock:
    """A clock that says how long the whole and the halves have taken, in turns."""

    def __init__(self, whole: float, halves: float) -> None:
        self.now, self.asked, self.seconds = 0.0, 0, (0.0, whole, 0.0, halves)

    def __call__(self) -> float:
        """The time."""
        self.now += self.seconds[self.asked % 4]
        self.asked += 1
        return self.now


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)], ids=str)
def test_halves_are_the_whole(lead: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    linear, x = plain(bias, dtype), torch.randn(*lead, ROWS, WIDTH).to(dtype)
    found, expected = in_halves(linear, x), linear(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_one_row_has_no_second_half() -> None:
    linear, x = plain(), tokens(rows=1)
    torch.testing.assert_close(in_halves(linear, x), linear(x))


@pytest.mark.parametrize(("halves", "faster"), [(0.5, True), (0.85, True), (0.95, False), (1.0, False), (2.0, False)])
def test_only_what_is_clearly_faster_is(halves: float, faster: bool) -> None:
    def the_same_bits(linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x)  # type: ignore[no-any-return]

    assert are_faster(plain(), tokens(), the_same_bits, clock=Clock(1.0, halves), products=by_tiles) == faster


def test_halves_with_other_bits_are_not_taken() -> None:
    def off_by_one_bit(linear: nn.Linear, x: Tensor) -> Tensor:
        output: Tensor = linear(x)
        output.view(torch.int16)[0, ROWS // 2, OUT // 2] ^= 1
        return output

    assert not are_faster(plain(), tokens(), off_by_one_bit, clock=Clock(1.0, 0.1), products=by_tiles)


@pytest.mark.parametrize("products", [None, "bfloat16"])
def test_a_processor_without_half_precision_or_with_vectors_of_it_is_not_timed(products: str | None) -> None:
    clock = Clock(1.0, 0.1)
    assert not are_faster(plain(), tokens(), clock=clock, products=lambda dtype: products)
    assert clock.asked == 0


def test_each_size_is_timed_once() -> None:
    asked: list[torch.Size] = []

    def recorded(linear: nn.Linear, x: Tensor) -> bool:
        asked.append(x.shape)
        return len(asked) == 1

    halves = Halves(are_faster=recorded)
    assert [halves.pay_off(plain(), tokens()) for _ in range(3)] == [True] * 3
    assert not halves.pay_off(plain(bias=False), tokens())
    assert not halves.pay_off(plain(), tokens(rows=59))
    torch.set_num_threads(1)
    assert not halves.pay_off(plain(), tokens())
    assert asked == [(1, ROWS, WIDTH), (1, ROWS, WIDTH), (1, 59, WIDTH), (1, ROWS, WIDTH)]


def test_products_that_are_not_worth_it_or_take_long_may_not_pay_off() -> None:
    products = ROWS * WIDTH * OUT
    assert Halves(least=products, most=products).may_pay_off(plain(), tokens())
    assert not Halves(least=products + 1, most=2 * products).may_pay_off(plain(), tokens())
    assert not Halves(least=1, most=products - 1).may_pay_off(plain(), tokens())


def test_no_more_sizes_are_known_than_there_is_room_for() -> None:
    halves = Halves(room=3, are_faster=lambda linear, x: True)
    for rows in range(1, 12):
        assert halves.pay_off(plain(), tokens(rows))
        assert 1 <= len(halves.known) <= 3


@pytest.mark.parametrize("bias", [False, True])
def test_neither_halves_nor_timing_them_take_more_memory_than_the_result_and_a_product(bias: bool) -> None:
    linear, x = nn.Linear(640, 320, bias=bias, dtype=torch.bfloat16), torch.randn(1, 1021, 640).to(torch.bfloat16)
    linear(x)
    result = 2 * 1021 * 320
    # What oneDNN takes besides differs from one processor to the next, and for the same product is never the same
    # as for half of it.
    whole, *of_rows = (peak_memory(partial(linear, rows)) for rows in (x, x[:, :511], x[:, 511:]))
    of_a_half = max(of_rows[0] - 2 * 511 * 320, of_rows[1] - 2 * 510 * 320)
    sums = 2 * 2 * (1021 + 320)
    timing = peak_memory(lambda: are_faster(linear, x, clock=Clock(1.0, 0.1), products=by_tiles))
    assert timing <= result + max(whole - result, of_a_half) + 2 * sums
    assert peak_memory(lambda: in_halves(linear, x)) <= result + of_a_half


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_takes_no_more_memory_than_the_module(bias: bool) -> None:
    """On this processor, timed as it is."""
    linear, x = nn.Linear(640, 320, bias=bias, dtype=torch.bfloat16), torch.randn(1, 1021, 640).to(torch.bfloat16)
    whole = peak_memory(lambda: linear(x))
    project(linear, x)
    assert peak_memory(lambda: project(linear, x)) <= whole
