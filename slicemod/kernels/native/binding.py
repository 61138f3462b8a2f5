"""The compiled library's functions, called through ctypes on tensors.

The library reads and writes memory at bare addresses. Whatever goes there is checked, and copied where its memory does
not hold its numbers, by `_readable`, and by nothing else.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

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


class WrongLibraryError(OSError):
    """A library that is not of attention.cpp, or of another version of it."""


def _functions(library: ctypes.CDLL) -> dict[str, Any]:
    """The functions of attention.cpp by their names, with their types.

    Raises:
        WrongLibraryError: the library has not all of them, or lays calls out otherwise.
    """
    counts = "call_bytes", "forward_bytes", "backward_bytes", "forward_rows", "vector_lanes"
    passes = {"forward": 6, "backward": 11}  # and how many pointers they take; a null pointer: not wanted
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
    """The functions of attention.cpp, for tensors.

    Attributes:
        path: the library's file.
        modes: how each dtype's products are computed, one of `FLOAT_MODE`, `BFLOAT_MODE` and `TILED_MODE`.
        vector_lanes: floats of a vector, 16 with AVX-512 and 8 with AVX2.
        workspace: gives fresh memory of so many bytes for a pass to compute in.

    Raises:
        OSError: the file is no library; a `WrongLibraryError` where it is not one of this version, which is unloaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace: Callable[[int], Tensor] = _bytes
        library = ctypes.CDLL(str(path))
        try:
            self._functions = _functions(library)
        except WrongLibraryError:
            _ctypes.dlclose(library._handle)  # or a better one at the same path would be taken for it
            raise
        self.vector_lanes = int(self._functions["vector_lanes"]())
        best = int(self._functions["best_mode"]())
        self.modes = {torch.float32: FLOAT_MODE, torch.float16: FLOAT_MODE, torch.bfloat16: best}

    def sizes(self, dtype: torch.dtype, sizes: tuple[int, ...], threads: int) -> tuple[int, int, int]:
        """Query rows of a slice, and workspace bytes of the forward and the backward pass.

        Args:
            dtype: of the tensors, one of `modes`.
            sizes: `(B, H, N, M, D, Dv)`.
            threads: how many there will be.
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
        """Write the output `(B, H, N, Dv)` and what `backward` wants to know of rows, `(2, B, H, N)`, float32.

        That is a product of query and key near the largest of the row, and the base-2 logarithm of the sum of all
        `exp(scale * (product - that one))`.

        Args:
            query: `(B, H, N, D)`, of any strides as all inputs, one of the dtypes in `modes`.
            key: `(B, H, M, D)`, same dtype.
            value: `(B, H, M, Dv)`, same dtype.
            output: fresh memory, as `row_sums`.
            row_sums: None where it is not wanted.
            scale: factor of the products, an ordinary one (`slicemod.call.has_ordinary_scale`).
            threads: how many to use.

        Raises:
            ValueError: sizes, dtypes or a scale that the library does not compute.
        """
        query, key, value = _readable("query", query), _readable("key", key), _readable("value", value)
        call = _call_of(scale, threads, query=query, key=key, value=value, output=output)
        self._run("forward", query.dtype, call, query, key, value, output, row_sums)

    def prepared_forward(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, threads: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """`forward` without `row_sums`, of any query, key, value and output with these sizes, strides and dtype."""
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
        """Write the gradients of query, key and value, those that are not None.

        Args:
            grad_output: `(B, H, N, Dv)`, in the dtype of the inputs, as `output`.
            inputs: query, key and value, as for `forward`.
            output: what `forward` wrote.
            row_sums: what `forward` wrote.
            gradients: fresh memory, sized as the inputs.
            scale: as in `forward`.
            threads: how many to use.

        Raises:
            ValueError: sizes, dtypes or a scale that do not go together.
        """
        query, key, value = (_readable(*named) for named in zip(("query", "key", "value"), inputs, strict=True))
        grad_output, output = _readable("grad_output", grad_output), _readable("output", output)
        row_sums = _readable("row_sums", row_sums).contiguous()
        tensors = {"query": query, "key": key, "value": value, "output": output, "grad_output": grad_output}
        named = dict(zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True))
        call = _call_of(scale, threads, **tensors, **named, row_sums=row_sums)
        delta = query.new_empty(query.shape[:3], dtype=torch.float32)  # of each row, the sum of output and its gradient
        self._run("backward", query.dtype, call, grad_output, query, key, value, output, row_sums, *gradients, delta)

    def _run(self, name: str, dtype: torch.dtype, call: _Call, *tensors: Tensor | None) -> None:
        setting = self._setting(dtype, call)
        workspace = self.workspace(self._count(f"{name}_bytes", setting))
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in (*tensors, workspace))
        _check_done(setting, self._functions[name](*setting, *addresses))

    def _setting(self, dtype: torch.dtype, call: _Call) -> tuple[Any, ...]:
        return self.modes[dtype], _ELEMENTS[dtype], ctypes.byref(call)

    def _count(self, name: str, setting: tuple[Any, ...]) -> int:
        """What a function of the library counts: bytes or rows."""
        count = int(self._functions[name](*setting))
        _check_done(setting, count >= 0)
        return count


def _check_done(setting: tuple[Any, ...], done: int) -> None:
    if not done:
        raise RuntimeError(
            f"native attention: expected a library with mode and type {setting[:2]}; got one without. "
            "Set SLICEMOD_NATIVE=0 and report this."
        )


def _address(tensor: Tensor) -> int | None:
    """Where a tensor's numbers lie in memory; None where what lies there is not its numbers.

    That is so of a view with the negative bit, of a tensor of zeros without any memory, and between two elements.
    """
    address = tensor.data_ptr()
    return None if not address or address % tensor.element_size() or tensor.is_neg() else address


def _readable(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the library cannot read its memory.

    Raises:
        ValueError: it is no strided tensor on the CPU.
    """
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a strided tensor on the CPU; got {tensor.layout} on {tensor.device}. "
            "Call sliced_attention, which takes more."
        )
    return tensor if _address(tensor) is not None else torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _call_of(scale: float, threads: int, **tensors: Tensor | None) -> _Call:
    """The call of these tensors, among them query, key, value and output; None is one that is not wanted."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    described = ((name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in given.items())
    return _call(scale, threads, *described)


Described = tuple[str, torch.dtype, torch.Size, tuple[int, ...]]


@lru_cache(maxsize=4096)  # a UNet asks the same for each layer and step, and the library only reads it
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
    return torch.empty(size, dtype=torch.uint8)
