"""`sliced_sdpa` on calls and small modules: whose call it takes, where it stays on, and what it passes on."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as bound_early
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from slicemod.plan import NotEnoughMemoryError
from slicemod.sdpa_mode import sliced_sdpa
from slicemod.sdpa_report import SdpaReport
from slicemod.swap import swap_attention
from tests.pytorch_versions import enters_objects_in_graphs, exports_forwards_that_are_objects

THREE: dict[str, Any] = {"kernel": "math", "steps": 3}
SEVEN: dict[str, Any] = {"kernel": "math", "steps": 7}
Tensors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def tensors() -> Tensors:
    query, key, value = torch.randn(3, 2, 5, 7, 4).unbind()
    return query, key, value


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(report: SdpaReport) -> list[int]:
    """Of every sliced call, eager or in a graph."""
    counted = report.calls + report.in_graphs
    return sorted(plan.steps for (_, plan) in counted.elements() if plan is not None)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        projected = self.project(hidden)
        output: Tensor = hidden + self.out(F.scaled_dot_product_attention(projected, projected, projected))
        return output


class Model(nn.Module):
    """Two blocks, of which each may be recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.reentrant = reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        return hidden

    def first(self, hidden: Tensor) -> Tensor:
        """What is not `forward`, as a VAE's `decode`."""
        output: Tensor = self.blocks[0](hidden)
        return output


@pytest.mark.parametrize("call", [F.scaled_dot_product_attention, bound_early], ids=["by module", "bound early"])
def test_a_call_is_sliced_by_whatever_name_it_is_made(call: Callable[..., Tensor], tensors: Tensors) -> None:
    expected = call(*tensors)
    with sliced_sdpa(THREE) as report:
        output = call(*tensors)
        assert torch.equal(call(query=tensors[0], key=tensors[1], value=tensors[2]), output)
    torch.testing.assert_close(output, expected)
    assert steps(report) == [3, 3]
    call(*tensors)
    assert steps(report) == [3, 3]


def test_all_arguments_mean_what_they_mean_in_sdpa() -> None:
    query, key, value = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 5)
    mask = torch.randn(2, 1, 7, 11)
    expected = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.3, enable_gqa=True)
    with sliced_sdpa(THREE) as report:
        output = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    assert steps(report) == [3]


def test_the_innermost_of_two_holds_and_ours_never_comes_back_to_ours(tensors: Tensors) -> None:
    expected = F.scaled_dot_product_attention(*tensors)
    with sliced_sdpa(THREE) as outer, sliced_sdpa({"kernel": "fused"}) as inner:
        torch.testing.assert_close(F.scaled_dot_product_attention(*tensors), expected)
    assert inner.kernels == {"fused": 1}
    assert outer.kernels == {}


def test_a_mode_of_another_inside_sees_the_call_first(tensors: Tensors) -> None:
    class Skip(TorchFunctionMode):  # as diffusers' perturbed-attention guidance
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[2] if func is F.scaled_dot_product_attention else func(*args, **(kwargs or {}))

    class Skipping(Attention):
        def forward(self, hidden: Tensor) -> Tensor:
            with Skip():
                return super().forward(hidden)

    model = Model()
    model.blocks[0] = Skipping()
    expected = model(tensors[0])
    installed = sliced_sdpa(THREE).install(model)
    torch.testing.assert_close(model(tensors[0]), expected)
    assert steps(installed.report) == [3]


def test_a_mode_is_on_in_its_own_thread_alone(tensors: Tensors) -> None:
    with sliced_sdpa(THREE) as report:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*tensors))
        thread.start()
        thread.join()
    assert steps(report) == []


def test_an_installed_model_is_sliced_from_any_thread(tensors: Tensors) -> None:
    model = Model()
    installed = sliced_sdpa(THREE).install(model)
    threads = [threading.Thread(target=lambda: [model(tensors[0]) for _ in range(13)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps(installed.report) == [3] * (2 * 13 * 3)
    F.scaled_dot_product_attention(*tensors)
    assert len(steps(installed.report)) == 2 * 13 * 3


def test_install_covers_methods_other_than_forward(tensors: Tensors) -> None:
    model = Model()
    with sliced_sdpa(THREE).install(model) as installed:
        model.first(tensors[0])
    model.first(tensors[0])
    assert steps(installed.report) == [3]


@pytest.mark.parametrize("part_first", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["kept", "reentrant", "not reentrant"])
def test_a_part_keeps_its_own_settings_in_both_passes(
    part_first: bool, reentrant: bool | None, tensors: Tensors
) -> None:
    model = Model(reentrant)
    part, whole = sliced_sdpa(SEVEN), sliced_sdpa(THREE)
    for settings, module in [(part, model.blocks[1]), (whole, model)][:: 1 if part_first else -1]:
        settings.install(module)
    model(tensors[0].requires_grad_()).sum().backward()
    times = 1 if reentrant is None else 2
    assert steps(whole.report) == [3] * times
    assert steps(part.report) == [7] * times


def test_removing_one_of_two_installs_leaves_the_other(tensors: Tensors) -> None:
    model = Model()
    part, whole = sliced_sdpa(SEVEN).install(model.blocks[1]), sliced_sdpa(THREE).install(model)
    part.remove()
    part.remove()
    model(tensors[0])
    assert steps(whole.report) == [3, 3]
    whole.remove()
    model(tensors[0])
    assert steps(whole.report) == [3, 3]
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_that_was_replaced_before_or_after_stays(tensors: Tensors) -> None:
    model = Model()
    called: list[str] = []

    def replace(name: str) -> Any:
        former = model.forward

        def forward(hidden: Tensor) -> Tensor:
            called.append(name)
            return former(hidden)

        model.forward = forward  # type: ignore[method-assign]
        return forward

    before = replace("before")
    installed = sliced_sdpa(THREE).install(model)
    model(tensors[0])
    after = replace("after")
    model(tensors[0])
    installed.remove()
    model(tensors[0])
    assert called == ["before", "after", "before", "after", "before"]
    assert steps(installed.report) == [3] * 4
    assert model.forward is after
    assert before is not after


def test_forward_keeps_its_signature() -> None:
    model = Model()
    sliced_sdpa().install(model)
    assert list(inspect.signature(model.forward).parameters) == ["hidden"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_installed_model_computes_with_its_own_weights(
    copied: Callable[[nn.Module], nn.Module], tensors: Tensors
) -> None:
    model = Model()
    expected = model(tensors[0])
    installed = sliced_sdpa(THREE).install(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(tensors[0]), expected)
    assert torch.equal(model(tensors[0]), tensors[0])
    assert len(steps(installed.report)) >= 2


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("by", ["Tensor.backward", "autograd.backward", "autograd.grad"])
def test_backward_in_the_block_recomputes_sliced(by: str, reentrant: bool, tensors: Tensors) -> None:
    if reentrant and by == "autograd.grad":
        pytest.skip("PyTorch's reentrant checkpoint refuses autograd.grad")
    model, hidden = Model(reentrant), tensors[0].requires_grad_()

    def backward(loss: Tensor) -> Tensor:
        if by == "autograd.grad":
            return torch.autograd.grad(loss, hidden)[0]
        hidden.grad = torch.zeros_like(hidden)
        if by == "Tensor.backward":
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward([loss])
        return hidden.grad

    expected = backward(model(hidden).square().sum())
    with sliced_sdpa(THREE) as report:
        loss = model(hidden).square().sum()
        torch.testing.assert_close(backward(loss), expected)
    assert steps(report) == [3] * 4


def test_backward_after_the_block_fails_where_pytorch_compares_what_it_recomputes(tensors: Tensors) -> None:
    model = Model(reentrant=False)
    with sliced_sdpa(THREE):
        loss = model(tensors[0].requires_grad_()).sum()
    with pytest.raises(CheckpointError, match="different metadata"):
        loss.backward()


def test_swapped_layers_keep_their_own_settings() -> None:
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    model = nn.Sequential(DiffusersAttention(query_dim=16, heads=2, dim_head=8))
    hidden = torch.randn(2, 11, 16)
    expected = model(hidden)
    swap_attention(model, {"kernel": "fused"})
    with sliced_sdpa(THREE) as report:
        torch.testing.assert_close(model(hidden), expected)
    assert steps(report) == []


def test_a_swap_after_an_install_is_refused_by_name() -> None:
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    model = nn.Sequential(DiffusersAttention(query_dim=16, heads=2, dim_head=8))
    sliced_sdpa(THREE).install(model)
    with pytest.raises(ValueError, match="forward was replaced"):
        swap_attention(model)


def test_attention_of_multi_head_attention_and_of_encoder_layers_is_sliced() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).eval()
    hidden = torch.randn(3, 7, 8)
    with torch.no_grad():  # where PyTorch has its fast path
        expected = encoder(hidden)
        with sliced_sdpa(THREE) as report:
            torch.testing.assert_close(encoder(hidden), expected)
        installed = sliced_sdpa(THREE).install(encoder.layers[1])
        torch.testing.assert_close(encoder(hidden), expected)
    assert steps(report) == [3, 3, 3]
    assert not report.passed_on
    assert steps(installed.report) == [3]


def test_multi_head_attention_that_returns_its_weights_is_named() -> None:
    layer, hidden = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 7, 8)
    expected = layer(hidden, hidden, hidden)
    with sliced_sdpa(THREE) as report:
        output = layer(hidden, hidden, hidden)
    torch.testing.assert_close(output, expected)
    assert [reason.split(",")[0] for reason in report.passed_on] == ["nn.MultiheadAttention with need_weights=True"]


def test_a_causal_bias_comes_to_its_class_first_and_then_to_ours() -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 4)
    expected = F.scaled_dot_product_attention(query, key, value, causal_lower_right(5, 11))
    with sliced_sdpa(THREE) as report:
        output = F.scaled_dot_product_attention(query, key, value, causal_lower_right(5, 11))
    torch.testing.assert_close(output, expected)
    assert steps(report) == [3]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_passed_on_and_named() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    nested = nested.unsqueeze(2).transpose(1, 2)
    with sliced_sdpa(THREE) as report:
        output = F.scaled_dot_product_attention(query=nested, key=nested, value=nested)
    assert output.is_nested
    assert report.passed_on == {"query, key, value: nested tensors": 1}
    assert steps(report) == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, at the first tangent
def test_forward_mode_is_passed_on_and_named(tensors: Tensors) -> None:
    query, key, value = tensors

    def attend(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    with sdpa_kernel(SDPBackend.MATH):  # the one of PyTorch's that has it
        expected = torch.func.jvp(attend, (query,), (key,))
        with sliced_sdpa(THREE) as report:
            found = torch.func.jvp(attend, (query,), (key,))
    torch.testing.assert_close(found, expected)
    assert sum(report.passed_on.values()) == 1
    assert "forward-mode differentiation" in str(report)


def test_what_pytorch_refuses_it_refuses_in_its_own_words(tensors: Tensors) -> None:
    query, key, value = tensors
    mask = torch.ones(7, 7, dtype=torch.int64)
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(query, key, value, mask)
    with sliced_sdpa(THREE) as report, pytest.raises(RuntimeError) as ours:
        F.scaled_dot_product_attention(query, key, value, mask)
    assert str(ours.value) == str(theirs.value)
    assert [reason.split(":")[0] for reason in report.passed_on] == ["attn_mask"]


def test_a_kernel_that_cannot_run_a_call_raises() -> None:
    query, value = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 5)
    with sliced_sdpa({"kernel": "fused"}) as report, pytest.raises(ValueError, match='kernel="fused"'):
        F.scaled_dot_product_attention(query, query, value)
    assert not report.passed_on


def test_a_budget_that_is_too_small_raises_and_is_never_passed_on(tensors: Tensors) -> None:
    with sliced_sdpa({"budget": 1, "kernel": "math"}) as report, pytest.raises(NotEnoughMemoryError, match="1 byte"):
        F.scaled_dot_product_attention(*tensors)
    assert not report.passed_on


def test_autocast_casts_as_for_sdpa(tensors: Tensors) -> None:
    query, key, value = tensors
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(query, key.bfloat16(), value)
        with sliced_sdpa(THREE) as report:
            output = F.scaled_dot_product_attention(query, key.bfloat16(), value)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    assert [shape.split(", ")[2] for shape in report.shapes] == ["2 bytes each"]


def attend_twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(F.scaled_dot_product_attention(query, key, value), key, value)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_compiled_under_the_mode_is_sliced_and_only_there(tensors: Tensors) -> None:
    expected = attend_twice(*tensors)
    compiled = torch.compile(attend_twice, backend="aot_eager", fullgraph=True)
    for slicing in (THREE, SEVEN):
        with sliced_sdpa(slicing) as report:
            torch.testing.assert_close(compiled(*tensors), expected)
            compiled(*tensors)
        assert steps(report) == [slicing["steps"]] * 2
        assert not report.calls
    compiled(*tensors)
    assert steps(report) == [7] * 2


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_with_fused_attention_does_not_come_back_to_ours_when_it_runs(tensors: Tensors) -> None:
    compiled = torch.compile(F.scaled_dot_product_attention, backend="eager", fullgraph=True)
    with sliced_sdpa({"kernel": "fused"}) as report:
        output = compiled(*tensors)
        compiled(*tensors)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*tensors))
    assert report.kernels == {"fused": 1}
    assert not report.calls


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("graph_break", [pytest.param(False, marks=enters_objects_in_graphs), True])
def test_a_mode_may_be_entered_in_compiled_code(graph_break: bool, tensors: Tensors) -> None:
    expected, slicer = attend_twice(*tensors), sliced_sdpa(THREE)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with slicer:
            query = F.scaled_dot_product_attention(query, key, value)
            if graph_break:
                torch._dynamo.graph_break()
            return F.scaled_dot_product_attention(query, key, value)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=not graph_break)
    torch.testing.assert_close(compiled(*tensors), expected)
    assert set(steps(slicer.report)) == {3}
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model_is_sliced_with_parts_of_their_own(compiled_first: bool, tensors: Tensors) -> None:
    model, hidden = Model(), tensors[0]
    expected = model(hidden)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if compiled_first:
        compiled(hidden)
    part = sliced_sdpa(SEVEN).install(model.blocks[1])
    whole = sliced_sdpa(THREE).install(compiled)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled(hidden), expected)
    assert (steps(whole.report), steps(part.report)) == ([3], [7])
    part.remove()
    whole.remove()
    torch.testing.assert_close(compiled(hidden), expected)
    assert (steps(whole.report), steps(part.report)) == ([3], [7])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects")  # a strict export's
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=exports_forwards_that_are_objects)])
def test_an_installed_model_is_exported_sliced(strict: bool, tensors: Tensors) -> None:
    model, hidden = Model(), tensors[0]
    expected = model(hidden)
    installed = sliced_sdpa(THREE).install(model)
    program = torch.export.export(model, (hidden,), strict=strict)
    assert steps(installed.report) == [3, 3]
    torch.testing.assert_close(program.module()(hidden), expected)


def test_install_names_what_it_cannot_install_into() -> None:
    with pytest.raises(TypeError, match=r"expected an nn.Module; got function"):
        sliced_sdpa().install(attend_twice)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch warn that TorchScript is deprecated
        script = torch.jit.script(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="TorchScript"):
        sliced_sdpa().install(script)


def test_settings_are_checked_when_they_are_given() -> None:
    with pytest.raises(ValueError, match="expected keys out of budget"):
        sliced_sdpa({"budgte": 1})
