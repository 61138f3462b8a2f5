"""What goes to the library at a bare address is what the tensor says, or it is refused by name."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slicemod.call import AttentionShape, has_ordinary_scale
from slicemod.functional import planned_attention
from slicemod.kernels.attention_operators import AttentionCall
from slicemod.kernels.native.binding import NativeLibrary
from slicemod.kernels.native.build import compiler_found, native_library, native_obstacle
from tests.kernels.native.test_operators import native
from tests.oracle import Inputs, layer_inputs, results

pytestmark = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")


def negative_view(sizes: tuple[int, ...]) -> Tensor:
    view = torch.complex(torch.randn(sizes), torch.randn(sizes)).conj().imag
    assert view.is_neg()
    return view


def between_elements(sizes: tuple[int, ...]) -> Tensor:
    memory = bytearray(1) + bytearray(torch.randn(sizes).numpy().tobytes())
    view = torch.frombuffer(memory, dtype=torch.float32, offset=1).view(sizes)
    assert view.data_ptr() % 4 == 1
    return view


def without_memory(sizes: tuple[int, ...]) -> Tensor:
    zeros = torch._efficientzerotensor(sizes)
    assert zeros.data_ptr() == 0
    return zeros


def one_number(sizes: tuple[int, ...]) -> Tensor:
    return torch.randn(()).expand(sizes)


KINDS: list[Callable[[tuple[int, ...]], Tensor]] = [negative_view, between_elements, without_memory, one_number]


def plain(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own."""
    return torch.empty(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_gives_what_its_numbers_give(kind: Callable[[tuple[int, ...]], Tensor], which: str) -> None:
    inputs = layer_inputs()
    view = kind(tuple(getattr(inputs, which).shape))
    setattr(inputs, which, view)
    same = Inputs(plain(inputs.query), plain(inputs.key), plain(inputs.value))
    grad = torch.randn(2, 3, 61, 11)
    ours, wanted = (results(native, each.leaves(), grad) for each in (inputs, same))
    for name, result in wanted.items():
        assert torch.equal(ours[name], result), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_a_view_gives_what_its_numbers_give(kind: Callable[[tuple[int, ...]], Tensor]) -> None:
    inputs, grad = layer_inputs(), kind((2, 3, 61, 11))
    ours, wanted = (results(native, inputs.leaves(), each) for each in (grad, plain(grad)))
    for name, result in wanted.items():
        assert torch.equal(ours[name], result), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_call_of_a_view_has_its_result(kind: Callable[[tuple[int, ...]], Tensor]) -> None:
    view = kind((2, 3, 521, 40))
    query = torch.randn(2, 3, 521, 40)
    tensor = torch.empty_strided(view.shape, view.stride()).copy_(plain(view)) if 0 not in view.stride() else view
    for _ in range(2):
        wanted, plan = planned_attention(query, tensor, query)  # known from here on, by sizes and strides
        assert plan is not None
        assert plan.kernel == "native"
        assert torch.equal(planned_attention(query, view, query)[0], wanted)


class Labelled(torch.Tensor):
    """A tensor of a class of its own."""


def test_a_tensor_of_another_class_gives_what_its_numbers_give() -> None:
    inputs = layer_inputs()
    wanted = inputs.run(native)
    inputs.key = inputs.key.as_subclass(Labelled)
    assert torch.equal(inputs.run(native), wanted)


def kept() -> list[Tensor]:
    inputs = layer_inputs()
    given = inputs.query, inputs.key, inputs.value
    output, row_sums = torch.ops.slicemod.native_attention(*given, None, None, 0.0, False, 0.3, True)
    return [torch.randn_like(output), *given, output, row_sums]


def test_what_was_kept_may_have_any_strides() -> None:
    *tensors, output, row_sums = kept()
    apart = row_sums.mT.contiguous().mT
    assert not apart.is_contiguous()
    wanted, found = (
        torch.ops.slicemod.native_attention_backward(
            *tensors, None, None, output, each, 0.0, False, 0.3, [True] * 3 + [False]
        )
        for each in (row_sums, apart)
    )
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("query", lambda tensor: tensor.double()),
        ("key", lambda tensor: tensor.bfloat16()),
        ("key", lambda tensor: tensor.to("meta")),
        ("key", lambda tensor: tensor.to_sparse()),
        ("value", lambda tensor: tensor[:, :, 1:]),
        ("value", lambda tensor: tensor.half()),
        ("output", lambda tensor: tensor.half()),
        ("output", lambda tensor: tensor[..., 1:]),
        ("grad_output", lambda tensor: tensor[:, :, 1:]),
        ("grad_output", lambda tensor: tensor.bfloat16()),
        ("row_sums", lambda tensor: tensor[..., 1:]),
        ("row_sums", lambda tensor: tensor.double()),
    ],
)
def test_what_the_library_would_read_wrongly_is_refused_by_name(name: str, changed: Callable[[Tensor], Tensor]) -> None:
    library = native_library()
    assert library is not None
    grad_output, query, key, value, output, row_sums = kept()
    tensors = {"query": query, "key": key, "value": value, "output": output}
    tensors |= {"grad_output": grad_output, "row_sums": row_sums}
    tensors[name] = changed(tensors[name])
    grad_output, query, key, value, output, row_sums = (
        tensors[each] for each in ("grad_output", "query", "key", "value", "output", "row_sums")
    )
    gradients = [torch.empty_like(query.float()), None, None, None]
    call = AttentionCall(query, key, value, None, None, 0.0, False, 0.3)
    with pytest.raises(ValueError, match=f"^{name}: expected .*; got "):
        library.backward(grad_output, call, output, row_sums, gradients, 2)


@pytest.mark.parametrize("scale", [1e-50, 1e-39, -0.3, 0.0, 1e39, 1e300, float("inf"), float("nan")])
def test_a_scale_that_it_does_not_compute_is_refused(scale: float) -> None:
    inputs = layer_inputs()
    with pytest.raises(ValueError, match="scale: expected"):
        native(inputs.query, inputs.key, inputs.value, scale=scale)
    assert not has_ordinary_scale(scale)


def compiled(folder: Path, source: str) -> Path:
    """A library of its own from some lines of C."""
    compiler, target = compiler_found(), folder / "library.so"
    assert compiler is not None
    command = [*compiler, "-x", "c++", "-shared", "-fPIC", "-o", str(target), "-"]
    subprocess.run(command, input=source.encode(), check=True)
    return target


def test_a_library_without_our_functions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"expected the functions of attention\.cpp; got"):
        NativeLibrary(compiled(tmp_path, 'extern "C" int slicemod_best_mode() { return 0; }'))


def all_functions(call_bytes: int, done: int) -> str:
    """A library that does nothing, and says so or not."""
    counts = "forward_bytes", "backward_bytes", "forward_rows", "vector_lanes", "best_mode", "forward", "backward"
    functions = "".join(f"long slicemod_{name}() {{ return {done}; }}" for name in counts)
    return f'extern "C" {{ {functions} long slicemod_call_bytes() {{ return {call_bytes}; }} }}'


def test_a_library_with_another_layout_of_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"expected calls of \d+ bytes; got a library for 8"):
        NativeLibrary(compiled(tmp_path, all_functions(8, 1)))


@pytest.mark.parametrize("done", [0, -1])
def test_a_call_that_was_not_done_is_an_error(tmp_path: Path, done: int) -> None:
    library = NativeLibrary(compiled(tmp_path, all_functions(ctypes.sizeof(_call_of_library()), done)))
    query = torch.randn(2, 3, 61, 11)
    call = AttentionCall(query, query, query, None, None, 0.0, False, 0.3)
    calls: list[Callable[[], Any]] = [lambda: library.forward(call, query, None, 2)]
    if done < 0:
        calls.append(lambda: library.sizes(torch.float32, AttentionShape(2, 3, 61, 61, 11, 4), 2))
    for run in calls:
        with pytest.raises(RuntimeError, match=r"expected a library with mode \d and type \d"):
            run()


def _call_of_library() -> type[ctypes.Structure]:
    from slicemod.kernels.native import binding

    return binding._Call
