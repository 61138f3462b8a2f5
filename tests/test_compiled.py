"""torch.compile, torch.export and the operators' registration: one node, whatever the slices."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig
from slicemod.functional import planned_attention, sliced_attention
from slicemod.memory.free_memory import PROBES, MemoryProbe
from tests.oracle import layer_inputs, layer_like
from tests.pairwise import pairwise

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "fused": {"kernel": "fused", "budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "40KiB", "policy": "exact"},
    "kept weights": {"kernel": "math", "steps": 7, "checkpoint": False},
}


THREE = SliceConfig(kernel="math", steps=3)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    """Self-attention, then cross-attention, as in a UNet's transformer block."""

    def __init__(self, slicing: dict[str, Any]) -> None:
        super().__init__()
        self.own = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing=slicing)
        self.cross = MemoryAwareCrossAttention(29, 23, heads=3, dim_head=11, slicing=slicing)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.own(x)
        output: Tensor = x + self.cross(x, context)
        return output


def step(model: Any, block: Block, x: Tensor, context: Tensor) -> list[Tensor]:
    """The output and the gradients of everything."""
    x = x.detach().requires_grad_()
    output = model(x, context)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *block.parameters()])]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("auto", "inductor"),
        pytest.param("exact", "inductor", marks=pytest.mark.slow),
        ("fused", "aot_eager"),
        pytest.param("rows", "aot_eager", marks=pytest.mark.slow),
        pytest.param("kept weights", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_layer_trains_and_infers_as_an_eager_one(name: str, backend: str) -> None:
    block = Block(SLICINGS[name])
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x, context = torch.randn(2, 61, 29), torch.randn(2, 7, 23)
    assert_same(step(compiled, block, x, context), step(block, block, x, context))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, context), block(x, context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"key_heads": 1},
        {"mask": torch.rand(61, 53) > 0.3},
        {"mask": torch.randn(3, 61, 53, requires_grad=True)},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "causal", "gqa", "bool mask", "mask with gradient", "bfloat16"],
)
@pytest.mark.parametrize("slicing", [THREE, None], ids=["math", "auto"])
def test_the_compiled_function_is_the_eager_one(settings: dict[str, Any], slicing: Any) -> None:
    inputs = layer_inputs(**settings).leaves()
    leaves = list(inputs.differentiable().values())

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
        return sliced_attention(query, key, value, mask, **given, slicing=slicing)

    eager = inputs.run(attention)
    compiled = inputs.run(torch.compile(attention, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, eager)
    grad = layer_like(2, 3, 61, 11).to(eager.dtype)
    for one, other in zip(
        torch.autograd.grad(compiled, leaves, grad), torch.autograd.grad(eager, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_settings_in_a_dict_compile_as_well() -> None:
    inputs = layer_inputs()

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sliced_attention(query, key, value, mask, slicing={"kernel": "math", "steps": 3})

    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(inputs.run(compiled), inputs.run(attention))


@pytest.mark.parametrize("name", SLICINGS)
def test_a_plan_that_is_given_compiles_as_well(name: str) -> None:
    inputs = layer_inputs()
    expected, plan = planned_attention(inputs.query, inputs.key, inputs.value, slicing=SLICINGS[name])

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sliced_attention(query, key, value, mask, plan=plan)

    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(inputs.run(compiled), expected)


def test_compiled_autocast_is_eager_autocast() -> None:
    block = Block({"kernel": "math", "steps": 3})
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, context = torch.randn(2, 61, 29), torch.randn(2, 7, 23)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, context), block(x, context))


def test_compiled_dropout_is_drawn_anew_each_call_and_alike_in_backward() -> None:
    inputs = layer_inputs()
    inputs.value = torch.eye(53).expand(2, 3, 53, 53)
    inputs = inputs.leaves()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sliced_attention(query, key, value, mask, dropout_p=0.5, slicing=THREE)

    weights, others = inputs.run(attention), inputs.run(attention)
    assert not torch.equal(weights, others)
    assert abs(float((weights == 0).double().mean()) - 0.5) < 0.02
    grad = torch.randn_like(weights)
    (grad_value,) = torch.autograd.grad(weights, inputs.value, grad)
    torch.testing.assert_close(grad_value, weights.detach().mT @ grad)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free memory that is different whenever it is asked for; what it answered."""
    answers: list[int] = []

    def free_memory(device: torch.device) -> int:
        answers.append(60_000 - 1_009 * len(answers))
        return answers[-1]

    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(free_memory))
    return answers


@pytest.mark.parametrize("training", [False, True])
def test_twenty_steps_compile_once_whatever_the_probe_answers(training: bool, probe: list[int]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    block = Block({"kernel": "math", "policy": "exact"})
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for _ in range(20):
        x, context = torch.randn(2, 61, 29), torch.randn(2, 7, 23)
        if training:
            step(compiled, block, x, context)
        else:
            with torch.no_grad():
                compiled(x, context)
    assert counter.frame_count == 1
    assert len(probe) == 2  # once for each layer, while the graph was traced


def test_a_new_resolution_compiles_at_most_once_more(probe: list[int]) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(Block({"kernel": "math", "policy": "exact"}), fullgraph=True, backend=counter)
    tokens = (61, 61, 71, 71, 83, 61, 83, 71)
    for index, count in enumerate(tokens):
        compiled(torch.randn(2, count, 29), torch.randn(2, 7, 23))
        assert counter.frame_count <= len(set(tokens[: index + 1]))


def test_other_settings_after_compilation_are_followed() -> None:
    block = Block({"kernel": "math", "steps": 1})
    rows: list[Any] = []

    def recording(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        rows.extend(node.args[-2] for node in graph.graph.nodes if "slicemod.attention" in str(node.target))
        return graph

    compiled = torch.compile(block, fullgraph=True, backend=recording)
    x, context = torch.randn(2, 61, 29), torch.randn(2, 7, 23)
    with torch.no_grad():
        compiled(x, context)
        block.own.slicing = SliceConfig(kernel="math", steps=4)
        compiled(x, context)
    assert rows == [61, 61, 16, 61]


def graph_sizes(steps: int) -> list[int]:
    """Nodes of the forward and of the backward graph of a block."""
    sizes: list[int] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    block = Block({"kernel": "math", "steps": steps})
    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    step(compiled, block, torch.randn(2, 127, 29), torch.randn(2, 7, 23))
    return sizes


def test_the_graph_is_as_large_for_64_slices_as_for_2() -> None:
    two, sixty_four = graph_sizes(2), graph_sizes(64)
    assert len(two) == 2
    assert two == sixty_four


def test_the_plan_that_ran_forward_runs_backward(probe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer_inputs().leaves()
    leaves = list(inputs.differentiable().values())
    steady = inputs.run(sliced_attention, slicing={"kernel": "math", "policy": "exact", "budget": 60_000})
    expected = torch.autograd.grad(steady.sum(), leaves)
    output = inputs.run(sliced_attention, slicing={"kernel": "math", "policy": "exact"})
    assert probe == [60_000]
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: 0))
    for one, other in zip(torch.autograd.grad(output.sum(), leaves), expected, strict=True):
        assert torch.equal(one, other)


def test_export_gives_a_program_that_computes_the_same() -> None:
    layer = MemoryAwareCrossAttention(29, heads=3, dim_head=11, slicing={"kernel": "math", "steps": 7}).eval()
    x = torch.randn(2, 61, 29)
    program = torch.export.export(layer, (x,))
    operators = [str(node.target) for node in program.graph.nodes if "slicemod" in str(node.target)]
    assert operators == ["slicemod.attention.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


OPERATED = (
    (torch.float32, torch.bfloat16, torch.float64),
    ("plain", "causal", "bool mask", "additive mask", "dropout"),
    # whether weights are kept; items, heads, rows and keys of a slice
    ((False, 1, 4, 3, 0), (True, 1, 4, 3, 0), (False, 2, 12, 7, 0), (False, 1, 1, 3, 2)),
)


def operator_call(dtype: torch.dtype, kind: str, slices: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call of `torch.ops.slicemod.attention`."""
    inputs = layer_inputs(dtype, heads=6, queries=7, keys=5)
    masks = {"bool mask": torch.rand(1, 1, 7, 5) > 0.3, "additive mask": torch.randn(1, 6, 1, 5).to(dtype)}
    seed, dropout_p = (torch.tensor(3), 0.3) if kind == "dropout" else (None, 0.0)
    tensors = (inputs.query, inputs.key, inputs.value, masks.get(kind), seed)
    return (*tensors, dropout_p, kind == "causal", 0.3, dtype.itemsize < 4, *slices)


# opcheck reads `.grad` of its own copies, which are no leaves where strides are a layer's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("dtype", "kind", "slices"), pairwise(*OPERATED), ids=str)
def test_the_forward_operator_is_registered_as_pytorch_wants_it(
    dtype: torch.dtype, kind: str, slices: tuple[Any, ...]
) -> None:
    leaves = [
        argument.detach().requires_grad_()
        if isinstance(argument, Tensor) and argument.is_floating_point()
        else argument
        for argument in operator_call(dtype, kind, slices)
    ]
    torch.library.opcheck(torch.ops.slicemod.attention, tuple(leaves))


@pytest.mark.parametrize(
    ("dtype", "kind", "slices", "needs"),
    pairwise(*OPERATED, [[True] * 4, [True, False, True, False]]),
    ids=str,
)
def test_the_backward_operator_is_registered_as_pytorch_wants_it(
    dtype: torch.dtype, kind: str, slices: tuple[Any, ...], needs: list[bool]
) -> None:
    arguments = operator_call(dtype, kind, slices)
    query, key, value, mask, seed, *settings, keep, items, heads, rows, keys = arguments
    needs = [*needs[:3], needs[3] and mask is not None and mask.dtype != torch.bool]
    kept = torch.ops.slicemod.attention(*arguments)[1]
    assert bool(kept.numel()) is keep
    grad_output = layer_like(2, 6, 7, 11, query.dtype)
    torch.library.opcheck(
        torch.ops.slicemod.attention_backward,
        (grad_output, query, key, value, mask, seed, kept, *settings, items, heads, rows, keys, needs),
    )


def test_a_plan_is_refused_by_a_graph_of_any_size() -> None:
    inputs = layer_inputs(keys=61)
    plan = planned_attention(inputs.query, inputs.key, inputs.value)[1]

    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return sliced_attention(query, key, value, plan=plan)

    tokens = {2: torch.export.Dim("tokens", min=2, max=4096)}
    with pytest.raises(ValueError, match="plan: expected none in a graph with a dynamic number of tokens"):
        torch.export.export(
            Attention(), (inputs.query, inputs.key, inputs.value), dynamic_shapes=[tokens] * 3, strict=False
        )
