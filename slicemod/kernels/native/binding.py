"""Calls the functions of the compiled library on tensors, through ctypes.

The library reads and writes memory at plain addresses. So every input first goes through `_readable`, which checks it,
and copies it if its memory does not hold its numbers as they are.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicemod.call import LEAST_SCALE, MOST_SCALE, has_ordinary_scale

FLOAT_MODE, BFLOAT_MODE, TILED_MODE = 0, 1, 2  # as attention.cpp numbers them
_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Call(ctypes.Structure):
    """`struct Call` of attention.cpp."""

    _fields_ = [
        ("sizes", ctypes.c_int64 * 6),
        *((name, ctypes.c_int64 * 4) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_int64 * 4) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int64),
    ]


class _Setting(NamedTuple):
    """What every function of the library takes first: how products are computed, the dtype's number, and the call."""

    mode: int
    element: int
    call: Any  # a reference, as ctypes makes it


class WrongLibraryError(OSError):
    """The library was not made of attention.cpp, or of another version of it."""


def _functions(library: ctypes.CDLL) -> dict[str, Any]:
    """The functions of attention.cpp by name, with their types.

    Raises:
        WrongLibraryError: a function is missing, or the library expects a `Call` of another size.
    """
    counts = "call_bytes", "forward_bytes", "backward_bytes", "forward_rows", "vector_lanes"
    passes = {"forward": 6, "backward": 11}  # and how many pointers they take; null for what is not wanted
    try:
        found = {name: library[f"slicemod_{name}"] for name in (*counts, *passes, "best_mode")}
    except AttributeError as error:
        raise WrongLibraryError(f"expected the functions of attention.cpp; got a library without: {error}") from error
    for name in counts:
        found[name].restype = ctypes.c_int64
    for name, pointers in passes.items():
        found[name].argtypes = ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Call), *[ctypes.c_void_p] * pointers
    if (size := int(found["call_bytes"]())) != ctypes.sizeof(_Call):
        raise WrongLibraryError(f"expected calls of {ctypes.sizeof(_Call)} bytes; got a library for {size}")
    return found


class NativeLibrary:
    """The functions of attention.cpp, called on tensors.

    Attributes:
        path: the library's file.
        modes: how the products of each dtype are computed, one of `FLOAT_MODE`, `BFLOAT_MODE` and `TILED_MODE`.
        vector_lanes: floats in a vector: 16 with AVX-512, 8 with AVX2.
        workspace: allocates the bytes that a pass computes in.

    Raises:
        OSError: the file is not a library. If it is not of this version, a `WrongLibraryError`; it is then unloaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace: Callable[[int], Tensor] = _bytes
        library = ctypes.CDLL(str(path))
        try:
            self._functions = _functions(library)
        except WrongLibraryError:
            _ctypes.dlclose(library._handle)  # otherwise the system takes a new file at the same path for this one
            raise
        self.vector_lanes = int(self._functions["vector_lanes"]())
        best = int(self._functions["best_mode"]())
        self.modes = {torch.float32: FLOAT_MODE, torch.float16: FLOAT_MODE, torch.bfloat16: best}

    def sizes(self, dtype: torch.dtype, sizes: tuple[int, ...], threads: int) -> tuple[int, int, int]:
        """Query rows of a slice, and workspace bytes of the forward and the backward pass.

        Args:
            dtype: the dtype of the tensors, a key of `modes`.
            sizes: `(B, H, N, M, D, Dv)`.
            threads: how many threads there will be.
        """
        call = _Call(sizes=(ctypes.c_int64 * 6)(*sizes), threads=threads)
        setting = self._setting(dtype, call)
        rows, forward, backward = (
            self._count(name, setting) for name in ("forward_rows", "forward_bytes", "backward_bytes")
        )
        return rows, forward, backward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        row_sums: Tensor | None,
        scale: float,
        threads: int,
    ) -> None:
        """Write the output `(B, H, N, Dv)`, and two numbers for each row that the backward pass needs.

        The first number, the row's shift, is a product of query and key near the largest of the row. The second is the
        base-2 logarithm of the row's sum of `exp(scale * (product - shift))`.

        Args:
            query: `(B, H, N, D)`, in one of the dtypes in `modes`. The inputs may have any strides.
            key: `(B, H, M, D)`, in the same dtype.
            value: `(B, H, M, Dv)`, in the same dtype.
            output: where to write the output, `(B, H, N, Dv)`.
            row_sums: where to write the two numbers of each row, `(2, B, H, N)`, float32; None if they are not wanted.
            scale: factor of the products, an ordinary number (`slicemod.call.has_ordinary_scale`).
            threads: how many threads to use.

        Raises:
            ValueError: the library does not compute these sizes, dtypes or scale.
        """
        query, key, value = _readable("query", query), _readable("key", key), _readable("value", value)
        call = _call_of(scale, threads, query=query, key=key, value=value, output=output)
        self._run("forward", query.dtype, call, query, key, value, output, row_sums)

    def prepared_forward(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, threads: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """A function that does `forward` without `row_sums`, for any tensors with these sizes, strides and dtype."""
        call = _call_of(scale, threads, query=query, key=key, value=value, output=output)
        setting = self._setting(query.dtype, call)
        size = self._count("forward_bytes", setting)
        function = self._functions["forward"]

        def forward(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
            addresses = _address(query), _address(key), _address(value)
            if None in addresses:
                return self.forward(query, key, value, output, None, scale, threads)
            workspace = self.workspace(size)
            return _check_done(setting, function(*setting, *addresses, output.data_ptr(), None, workspace.data_ptr()))

        return forward

    def backward(
        self,
        grad_output: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        row_sums: Tensor,
        gradients: Sequence[Tensor | None],
        scale: float,
        threads: int,
    ) -> None:
        """Write the gradients of query, key and value.

        Args:
            grad_output: the gradient of the output, `(B, H, N, Dv)`, in the dtype of the inputs.
            inputs: query, key and value, as for `forward`.
            output: the output that `forward` wrote.
            row_sums: the numbers that `forward` wrote.
            gradients: where to write the three gradients, each with the sizes of its input; None if one is not wanted.
            scale: as in `forward`.
            threads: how many threads to use.

        Raises:
            ValueError: sizes, dtypes and scale do not go together.
        """
        query, key, value = (_readable(*named) for named in zip(("query", "key", "value"), inputs, strict=True))
        grad_output, output = _readable("grad_output", grad_output), _readable("output", output)
        row_sums = _readable("row_sums", row_sums).contiguous()
        tensors = {"query": query, "key": key, "value": value, "output": output, "grad_output": grad_output}
        named = dict(zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True))
        call = _call_of(scale, threads, **tensors, **named, row_sums=row_sums)
        delta = query.new_empty(query.shape[:3], dtype=torch.float32)  # of each row: the sum of output times gradient
        self._run("backward", query.dtype, call, grad_output, query, key, value, output, row_sums, *gradients, delta)

    def _run(self, name: str, dtype: torch.dtype, call: _Call, *tensors: Tensor | None) -> None:
        setting = self._setting(dtype, call)
        workspace = self.workspace(self._count(f"{name}_bytes", setting))
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in (*tensors, workspace))
        _check_done(setting, self._functions[name](*setting, *addresses))

    def _setting(self, dtype: torch.dtype, call: _Call) -> _Setting:
        return _Setting(self.modes[dtype], _ELEMENTS[dtype], ctypes.byref(call))

    def _count(self, name: str, setting: _Setting) -> int:
        """The number of bytes or rows that a function of the library returns."""
        count = int(self._functions[name](*setting))
        _check_done(setting, count >= 0)
        return count


def _check_done(setting: _Setting, done: int) -> None:
    if not done:
        raise RuntimeError(
            f"native attention: expected a library with mode {setting.mode} and type {setting.element}; got one "
            "without. Set SLICEMOD_NATIVE=0 and report this."
        )


def _address(tensor: Tensor) -> int | None:
    """The address of a tensor's numbers; None if the memory there does not hold them as they are.

    This is so for a view with the negative bit, for a tensor of zeros that has no memory, and for an address between
    two elements.
    """
    address = tensor.data_ptr()
    return None if not address or address % tensor.element_size() or tensor.is_neg() else address


def _readable(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the library cannot read its memory.

    Raises:
        ValueError: the tensor is not a strided tensor on the CPU.
    """
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a strided tensor on the CPU; got {tensor.layout} on {tensor.device}. "
            "Call sliced_attention, which takes more."
        )
    if _address(tensor) is not None:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _call_of(scale: float, threads: int, **tensors: Tensor | None) -> _Call:
    """The `Call` of these tensors, among them query, key, value and output. None for a tensor that is not wanted."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    described = ((name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in given.items())
    return _call(scale, threads, *described)


Described = tuple[str, torch.dtype, torch.Size, tuple[int, ...]]


@lru_cache(maxsize=4096)  # a UNet makes the same calls in each step, and the library does not change a `Call`
def _call(scale: float, threads: int, query: Described, key: Described, value: Described, *others: Described) -> _Call:
    if not has_ordinary_scale(scale):
        raise ValueError(
            f"scale: expected {LEAST_SCALE} to {MOST_SCALE}; got {scale}. Call sliced_attention, which takes any."
        )
    shapes = query[2], key[2], value[2]
    if not all(len(shape) == 4 and 0 not in shape for shape in shapes):
        raise ValueError(
            "query, key, value: expected (B, H, N, D), (B, H, M, D) and (B, H, M, Dv), no size 0; got "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}. Call sliced_attention, which takes more."
        )
    (batch, heads, queries, width), keys, values = shapes[0], shapes[1][2], shapes[2][3]
    if query[1] not in _ELEMENTS:
        raise ValueError(
            f"query: expected one of {', '.join(map(str, _ELEMENTS))}; got {query[1]}. Call sliced_attention, which "
            "takes more."
        )
    expected = {
        "query": (batch, heads, queries, width),
        "key": (batch, heads, keys, width),
        "value": (batch, heads, keys, values),
        "output": (batch, heads, queries, values),
        "row_sums": (2, batch, heads, queries),
    }
    call = _Call(sizes=(ctypes.c_int64 * 6)(batch, heads, queries, keys, width, values), scale=scale, threads=threads)
    for name, dtype, shape, strides in (query, key, value, *others):
        wanted = expected[name.removeprefix("grad_")], torch.float32 if name == "row_sums" else query[1]
        if (tuple(shape), dtype) != wanted:
            raise ValueError(
                f"{name}: expected {wanted[0]} of {wanted[1]}; got {tuple(shape)} of {dtype}. "
                "Call sliced_attention, which takes more."
            )
        if name != "row_sums":  # contiguous
            setattr(call, name, (ctypes.c_int64 * 4)(*strides))
    return call


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default device is
