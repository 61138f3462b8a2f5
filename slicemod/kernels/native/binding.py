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

from slicemod.call import LEAST_SCALE, MOST_SCALE, AttentionShape, has_ordinary_scale
from slicemod.kernels.attention_operators import AttentionCall
from slicemod.kernels.plain_memory import address_of, readable

FLOAT_MODE, BFLOAT_MODE, TILED_MODE = 0, 1, 2  # as attention.cpp numbers them
_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MASK_ELEMENTS = {**_ELEMENTS, torch.bool: 3}
_NO_MASK = -1
NUMBERS = (2,)  # of each row, that the forward pass keeps for the backward pass

# Runs a pass on tensors like those that it was prepared for. False, and nothing done, if the library cannot read one.
Prepared = Callable[..., bool]


class _Call(ctypes.Structure):
    """`struct Call` of attention.cpp."""

    _fields_ = [
        ("sizes", ctypes.c_int64 * 7),
        *((name, ctypes.c_int64 * 4) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_int64 * 4) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_int64 * 4) for name in ("mask", "grad_mask")),
        *((name, ctypes.c_int64) for name in ("mask_element", "mask_gradient", "causal")),
        *((name, ctypes.c_float) for name in ("scale", "dropout_p")),
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
    passes = {"forward": 8, "backward": 14}  # and how many pointers they take; null for what is not wanted
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
        vector_lanes: floats in a vector: 16 with AVX-512, 8 with AVX2, 4 with NEON.
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

    def sizes(self, dtype: torch.dtype, shape: AttentionShape, threads: int) -> tuple[int, int, int]:
        """Query rows of a slice, and workspace bytes of the forward and the backward pass.

        Args:
            dtype: the dtype of the tensors, a key of `modes`.
            shape: sizes of the call.
            threads: how many threads there will be.
        """
        setting = self._setting(dtype, _planned_call(shape, threads))
        rows, forward, backward = (
            self._count(name, setting) for name in ("forward_rows", "forward_bytes", "backward_bytes")
        )
        return rows, forward, backward

    def forward(self, call: AttentionCall, output: Tensor, row_sums: Tensor | None, threads: int) -> None:
        """Write the output `(B, H, N, Dv)`, and two numbers for each row that the backward pass needs.

        The first number, the row's shift, is a score near the largest of the row, without its scale if there is no
        mask. The second is the base-2 logarithm of the row's sum of weights.

        Args:
            call: what to compute.
            output: where to write the output, `(B, H, N, Dv)`.
            row_sums: where to write the two numbers of each row, `(2, B, H, N)`, float32; None if they are not wanted.
            threads: how many threads to use.

        Raises:
            ValueError: the library does not compute these sizes, dtypes or scale.
        """
        call = call.with_each(_readable)
        _done(self.prepared_forward(call, output, row_sums, threads)(*call.inputs, output, row_sums))

    def prepared_forward(self, call: AttentionCall, output: Tensor, row_sums: Tensor | None, threads: int) -> Prepared:
        """A function that does `forward`, for tensors with the sizes, strides and dtypes of these.

        These may be on the device "meta", and are not kept alive. The function takes the call's inputs, then `output`
        and `row_sums`.
        """
        described = _call_of(call, threads, output=output, row_sums=row_sums)
        return self._prepared("forward", call.query.dtype, described)

    def backward(
        self,
        grad_output: Tensor,
        call: AttentionCall,
        output: Tensor,
        row_sums: Tensor,
        gradients: Sequence[Tensor | None],
        threads: int,
    ) -> None:
        """Write the gradients of query, key, value and mask.

        Args:
            grad_output: the gradient of the output, `(B, H, N, Dv)`, in the dtype of the inputs.
            call: what `forward` computed.
            output: the output that `forward` wrote.
            row_sums: the numbers that `forward` wrote.
            gradients: where to write the four gradients, each with the sizes of its input; None if one is not wanted.
            threads: how many threads to use.

        Raises:
            ValueError: sizes, dtypes and scale do not go together.
        """
        call = call.with_each(_readable)
        grad_output, output = _readable("grad_output", grad_output), _readable("output", output)
        row_sums = _readable("row_sums", row_sums).contiguous()
        run = self.prepared_backward(grad_output, call, output, row_sums, gradients, threads)
        delta = row_sums.new_empty(row_sums.shape[1:])  # of each row: the sum of output times gradient
        if (grad_mask := gradients[3]) is not None and grad_mask.shape[3] == 1:
            grad_mask.zero_()  # what all keys of a row share changes no weight
        _done(run(grad_output, *call.inputs, output, row_sums, *gradients, delta))

    def prepared_backward(
        self,
        grad_output: Tensor,
        call: AttentionCall,
        output: Tensor,
        row_sums: Tensor,
        gradients: Sequence[Tensor | None],
        threads: int,
    ) -> Prepared:
        """A function that does `backward` for tensors like these. It leaves alone the gradient of what all keys share.

        These may be on the device "meta", and are not kept alive. The function takes `grad_output`, the call's inputs,
        `output`, `row_sums`, the four gradients, and a `(B, H, N)` in float32 to compute in.
        """
        named = dict(zip(("grad_query", "grad_key", "grad_value", "grad_mask"), gradients, strict=True))
        described = _call_of(call, threads, output=output, grad_output=grad_output, **named, row_sums=row_sums)
        return self._prepared("backward", call.query.dtype, described)

    def _prepared(self, name: str, dtype: torch.dtype, call: _Call) -> Prepared:
        setting = self._setting(dtype, call)
        size, function = self._count(f"{name}_bytes", setting), self._functions[name]

        def run(*tensors: Tensor | None) -> bool:
            addresses = [0 if tensor is None else address_of(tensor) for tensor in tensors]
            if None in addresses:
                return False
            workspace = self.workspace(size)
            _check_done(setting, function(*setting, *addresses, workspace.data_ptr()))
            return True

        return run

    def _setting(self, dtype: torch.dtype, call: _Call) -> _Setting:
        return _Setting(self.modes[dtype], _ELEMENTS[dtype], ctypes.byref(call))

    def _count(self, name: str, setting: _Setting) -> int:
        """The number of bytes or rows that a function of the library returns."""
        count = int(self._functions[name](*setting))
        _check_done(setting, count >= 0)
        return count


def _done(done: bool) -> None:
    if not done:
        raise ValueError(
            "native attention: expected results with plain memory of their own; got one that the library cannot write. "
            "Call sliced_attention, which makes them."
        )


def _check_done(setting: _Setting, done: int) -> None:
    if not done:
        raise RuntimeError(
            f"native attention: expected a library with mode {setting.mode} and type {setting.element}; got one "
            "without. Set SLICEMOD_NATIVE=0 and report this."
        )


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
    return readable(tensor)


class _Described(NamedTuple):
    """A tensor without its numbers."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


def _call_of(call: AttentionCall, threads: int, **results: Tensor | None) -> _Call:
    """The `_Call` of these tensors. `results` are output, gradients and what else is read or written."""
    given = {"query": call.query, "key": call.key, "value": call.value, "mask": call.mask, **results}
    tensors = [
        _Described(name, tensor.dtype, tensor.shape, tensor.stride())
        for name, tensor in given.items()
        if tensor is not None
    ]
    if call.dropout_p > 0 and (call.seed is None or call.seed.dtype != torch.int64 or call.seed.numel() != 1):
        raise ValueError(f"seed: expected one int64, as dropout_p is {call.dropout_p}; got {call.seed}. Draw one.")
    return _described_call(call.scale, threads, call.dropout_p, call.is_causal, *tensors)


@lru_cache(maxsize=4096)  # a UNet makes the same calls in each step, and the library does not change a `_Call`
def _described_call(scale: float, threads: int, dropout_p: float, is_causal: bool, *tensors: _Described) -> _Call:
    if not has_ordinary_scale(scale):
        raise ValueError(
            f"scale: expected {LEAST_SCALE} to {MOST_SCALE}; got {scale}. Call sliced_attention, which takes any."
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected 0 to 1; got {dropout_p}. It is the probability of dropping a weight.")
    query, key, value, *_ = tensors
    shapes = query.shape, key.shape, value.shape
    if not all(len(shape) == 4 and 0 not in shape for shape in shapes) or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query, key, value: expected (B, H, N, D), (B, Hk, M, D) and (B, Hk, M, Dv), no size 0, H a multiple of Hk"
            f"; got {', '.join(str(tuple(shape)) for shape in shapes)}. Call sliced_attention, which takes more."
        )
    (batch, heads, queries, width), (_, key_heads, keys, _), values = query.shape, key.shape, value.shape[3]
    if query.dtype not in _ELEMENTS:
        raise ValueError(
            f"query: expected one of {', '.join(map(str, _ELEMENTS))}; got {query.dtype}. Call sliced_attention, which "
            "takes more."
        )
    expected = {
        "query": (batch, heads, queries, width),
        "key": (batch, key_heads, keys, width),
        "value": (batch, key_heads, keys, values),
        "output": (batch, heads, queries, values),
        "row_sums": (*NUMBERS, batch, heads, queries),
    }
    call = _Call(sizes=(ctypes.c_int64 * 7)(batch, heads, queries, keys, width, values, key_heads))
    call.scale, call.threads, call.dropout_p, call.causal = scale, threads, dropout_p, is_causal
    call.mask_element = _NO_MASK
    mask = None
    for tensor in tensors:
        name, dtype, shape, strides = tensor
        if name == "mask":
            _check_mask(tensor, (batch, heads, queries, keys))
            mask, call.mask_element = tensor, _MASK_ELEMENTS[dtype]
        elif name == "grad_mask":
            if mask is None or (shape, dtype) != (mask.shape, mask.dtype):
                raise ValueError(f"grad_mask: expected the sizes and dtype of the mask; got {tuple(shape)} of {dtype}.")
            call.mask_gradient = 1
        else:
            wanted = expected[name.removeprefix("grad_")], torch.float32 if name == "row_sums" else query.dtype
            if (tuple(shape), dtype) != wanted:
                raise ValueError(
                    f"{name}: expected {wanted[0]} of {wanted[1]}; got {tuple(shape)} of {dtype}. "
                    "Call sliced_attention, which takes more."
                )
        if name == "row_sums":  # contiguous
            continue
        if name in ("mask", "grad_mask"):
            strides = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
        setattr(call, name, (ctypes.c_int64 * 4)(*strides))
    return call


def _check_mask(mask: _Described, scores: tuple[int, ...]) -> None:
    fits = len(mask.shape) == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, scores, strict=True))
    if not fits or mask.dtype not in _MASK_ELEMENTS:
        raise ValueError(
            f"mask: expected sizes of 1 or those of {scores}, of {', '.join(map(str, _MASK_ELEMENTS))}; got "
            f"{tuple(mask.shape)} of {mask.dtype}. Call sliced_attention, which takes more."
        )


def _planned_call(shape: AttentionShape, threads: int) -> _Call:
    """A call to count bytes for, without tensors."""
    sizes = (
        shape.batch,
        shape.heads,
        shape.queries,
        shape.keys,
        shape.head_dim,
        shape.values,
        shape.heads // shape.group,
    )
    call = _Call(sizes=(ctypes.c_int64 * 7)(*sizes), scale=1, threads=threads, causal=shape.causal)
    call.dropout_p, call.mask_element = 0.5 if shape.dropout else 0, _NO_MASK
    if (mask := shape.mask) is not None:
        call.mask_element, call.mask_gradient = _MASK_ELEMENTS[torch.float32], mask.has_grad
    return call


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default device is
