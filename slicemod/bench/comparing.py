"""Comparing peers: checked against float64 first, then timed in interleaved rounds, then their peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.bench.peers import Workload, make_layer, oracle, peers_of

MOST_ERROR = 4.0  # times SDPA's, on the same input; a peer beyond it is not timed
RATE_SIZE = 2048


@dataclass(frozen=True)
class Measurement:
    """One peer on one workload.

    Attributes:
        workload: its name.
        peer: its name.
        dtype: of weights and input.
        training: a training step rather than a forward pass.
        error: relative error of the output against float64.
        seconds: median time.
        ratio: median over the rounds of its time by that of SDPA in the same round.
        spread: first and third quartile of those ratios.
        peak_bytes: peak memory beyond inputs and weights.
        rate_share: share of the large matrix product's rate, counting the products of projections and attention.
    """

    workload: str
    peer: str
    dtype: str
    training: bool
    error: float
    seconds: float
    ratio: float
    spread: tuple[float, float]
    peak_bytes: int
    rate_share: float


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on this machine."""
    left, right = torch.randn(2, RATE_SIZE, RATE_SIZE).to(dtype).unbind()
    times = [_seconds(lambda: left @ right) for _ in range(4)]
    return 2 * RATE_SIZE**3 / min(times[1:])


def flops(work: Workload, *, training: bool) -> int:
    """Floating-point operations of the layer's matrix products; a training step has three times the forward's."""
    inner = work.heads * work.head_dim
    tokens, width = work.context if work.context is not None else (work.queries, work.channels)
    projections = 2 * work.queries * work.channels * inner + 2 * tokens * width * inner
    attention = 2 * work.queries * tokens * inner
    return 2 * work.batch * (projections + attention) * (3 if training else 1)


def compare(
    work: Workload, dtype: torch.dtype, *, training: bool, rounds: int, rate: float
) -> Iterator[Measurement | str]:
    """Measure every peer on one workload.

    Yields:
        A line for every round, for a progress display, and then the measurements.
    """
    torch.manual_seed(0)
    layer = make_layer(work).to(dtype)
    x = torch.randn(work.batch, work.queries, work.channels).to(dtype)
    context = None if work.context is None else torch.randn(work.batch, *work.context).to(dtype)
    peers = peers_of(work, layer)
    errors = _errors(peers, oracle(work, layer), x, context)
    peers = {name: peer for name, peer in peers.items() if errors[name] <= MOST_ERROR * errors["SDPA"]}
    calls = {name: _call(peer, x, context, training=training) for name, peer in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            seconds = _seconds(call)
            if turn:  # the first round warms up
                times[name].append(seconds)
        yield f"{work.name}, round {turn} of {rounds}"
    for name, call in calls.items():
        ratios = sorted(own / base for own, base in zip(times[name], times["SDPA"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        seconds = statistics.median(times[name])
        yield Measurement(
            workload=work.name,
            peer=name,
            dtype=str(dtype).removeprefix("torch."),
            training=training,
            error=errors[name],
            seconds=seconds,
            ratio=statistics.median(ratios),
            spread=(quartiles[0], quartiles[2]),
            peak_bytes=peak_memory(call),
            rate_share=flops(work, training=training) / seconds / rate,
        )


def _errors(peers: dict[str, nn.Module], exact: nn.Module, x: Tensor, context: Tensor | None) -> dict[str, float]:
    with torch.no_grad():
        wanted = exact(x.double(), None if context is None else context.double())
        return {
            name: float((peer(x, context).double() - wanted).norm() / wanted.norm()) for name, peer in peers.items()
        }


def _call(peer: nn.Module, x: Tensor, context: Tensor | None, *, training: bool) -> Callable[[], object]:
    if not training:

        def infer() -> object:
            with torch.no_grad():
                return peer(x, context)

        return infer
    inputs = [x.clone().requires_grad_(), *peer.parameters()]

    def step() -> object:
        return torch.autograd.grad(peer(inputs[0], context).square().mean(), inputs)

    return step


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
