"""The compiled library's functions, called through ctypes on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


class NativeLibrary:
    """The functions of attention.cpp, for tensors.

    Attributes:
        modes: how each dtype's products are computed, one of `FLOAT_MODE`, `BFLOAT_MODE` and `TILED_MODE`.
        vector_lanes: floats of a vector, 16 with AVX-512 and 8 with AVX2.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name in ("forward_bytes", "backward_bytes", "forward_rows", "vector_lanes"):
            getattr(self._functions, f"slicemod_{name}").restype = ctypes.c_int64
        for name, tensors in (("slicemod_forward", 6), ("slicemod_backward", 11)):  # None is no tensor
            types = ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Call), *[ctypes.c_void_p] * tensors
            getattr(self._functions, name).argtypes = types
        self.vector_lanes = int(self._functions.slicemod_vector_lanes())
        best = int(self._functions.slicemod_best_mode())
        self.modes = {torch.float32: FLOAT_MODE, torch.float16: FLOAT_MODE, torch.bfloat16: best}

    def sizes(self, dtype: torch.dtype, sizes: tuple[int, ...], threads: int) -> tuple[int, int, int]:
        """Query rows of a slice, and workspace bytes of the forward and the backward pass.

        Args:
            dtype: of the tensors, one of `modes`.
            sizes: `(B, H, N, M, D, Dv)`.
            threads: how many there will be.
        """
        call = _Call(sizes=(ctypes.c_int64 * 6)(*sizes), threads=threads)
        arguments = self.modes[dtype], _ELEMENTS[dtype], ctypes.byref(call)
        return (
            int(self._functions.slicemod_forward_rows(*arguments)),
            int(self._functions.slicemod_forward_bytes(*arguments)),
            int(self._functions.slicemod_backward_bytes(*arguments)),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor | None,
        scale: float,
        threads: int,
    ) -> None:
        """Write the output `(B, H, N, Dv)` and the base-2 logarithms of the rows' sums `(B, H, N)`, float32.

        Query `(B, H, N, D)`, key `(B, H, M, D)` and value `(B, H, M, Dv)` of any strides.
        """
        call = _call(
            (query.shape, key.shape, value.shape), scale, threads, **_strides(query, key, value, output=output)
        )
        self._run("forward", query.dtype, call, query, key, value, output, logsumexp)

    def prepared_forward(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, threads: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """`forward` without logarithms, of any query, key, value and output with these sizes, strides and dtype."""
        strides = _strides(query, key, value, output=output)
        call = _call((query.shape, key.shape, value.shape), scale, threads, **strides)
        setting = self._setting(query.dtype, call)
        size = self._workspace_bytes("forward", setting)
        function = self._functions.slicemod_forward

        def forward(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
            workspace = _workspace(size)
            function(
                *setting,
                query.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                output.data_ptr(),
                None,
                workspace.data_ptr(),
            )

        return forward

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        gradients: Sequence[Tensor | None],
        scale: float,
        threads: int,
    ) -> None:
        """Write the gradients of query, key and value, those that are not None."""
        named = dict(zip(("grad_query", "grad_key", "grad_value"), gradients, strict=True))
        strides = _strides(query, key, value, output=output, grad_output=grad_output, **named)
        call = _call((query.shape, key.shape, value.shape), scale, threads, **strides)
        delta = query.new_empty(query.shape[:3], dtype=torch.float32)  # of each row, the sum of output and its gradient
        self._run("backward", query.dtype, call, grad_output, query, key, value, output, logsumexp, *gradients, delta)

    def _run(self, name: str, dtype: torch.dtype, call: _Call, *tensors: Tensor | None) -> None:
        setting = self._setting(dtype, call)
        workspace = _workspace(self._workspace_bytes(name, setting))
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (*tensors, workspace))
        getattr(self._functions, f"slicemod_{name}")(*setting, *pointers)

    def _setting(self, dtype: torch.dtype, call: _Call) -> tuple[Any, ...]:
        return self.modes[dtype], _ELEMENTS[dtype], ctypes.byref(call)

    def _workspace_bytes(self, name: str, setting: tuple[Any, ...]) -> int:
        size = int(getattr(self._functions, f"slicemod_{name}_bytes")(*setting))
        if size < 0:
            raise RuntimeError(
                f"native attention: expected a library with mode and type {setting[:2]}; got one without. "
                "Set SLICEMOD_NATIVE=0 and report this."
            )
        return size


def _strides(query: Tensor, key: Tensor, value: Tensor, **others: Tensor | None) -> dict[str, tuple[int, ...]]:
    strides = {"query": query.stride(), "key": key.stride(), "value": value.stride()}
    for name, tensor in others.items():
        if tensor is not None:
            strides[name] = tensor.stride()
    return strides


@lru_cache(maxsize=4096)  # a UNet asks the same for each layer and step, and the library only reads it
def _call(shapes: tuple[torch.Size, ...], scale: float, threads: int, **strides: tuple[int, ...]) -> _Call:
    query, key, value = shapes
    sizes = (*query[:3], key[2], query[3], value[3])
    if 0 in sizes or key[:2] != query[:2] or value[:3] != key[:3] or key[3] != query[3]:
        raise ValueError(
            "query, key, value: expected (B, H, N, D), (B, H, M, D) and (B, H, M, Dv), no size 0; got "
            f"{tuple(query)}, {tuple(key)} and {tuple(value)}. Call sliced_attention, which takes more."
        )
    call = _Call(sizes=(ctypes.c_int64 * 6)(*sizes), scale=scale, threads=threads)
    for name, stride in strides.items():
        setattr(call, name, (ctypes.c_int64 * 4)(*stride))
    return call


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
