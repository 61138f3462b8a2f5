"""The native kernel: compiled for this processor when it is first wanted, kept on disk, and called through ctypes.

`native/attention.cpp` needs an x86-64 processor with AVX2, FMA and F16C, Linux, and a C++ compiler, as `torch.compile`
does. What is missing is said by `native_obstacle`, and attention is then PyTorch's. The compiled library lies in
`$SLICEMOD_CACHE`, or `slicemod` in the user's cache folder, under a name made of the source, the compiler and the
processor. `SLICEMOD_NATIVE=0` does without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno")
# PyTorch's word for the processor, which ATEN_CPU_CAPABILITY can lower, and flags for no more than that.
_CAPABILITIES = {"AVX2": ("-mno-avx512f",), "AVX512": ()}
_COMPILERS = ("c++", "g++", "clang++")

FLOAT_MODE, BFLOAT_MODE, TILED_MODE = 0, 1, 2  # as attention.cpp numbers them
_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeLibraryWarning(RuntimeWarning):
    """The native kernel could not be compiled, and attention is PyTorch's."""


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


@lru_cache(maxsize=1)
def _library_or_obstacle() -> NativeLibrary | str:
    if os.environ.get("SLICEMOD_NATIVE", "1") == "0":
        return "SLICEMOD_NATIVE is 0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it runs on Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    if torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES:
        return f"it needs {' or '.join(_CAPABILITIES)}, and PyTorch finds {torch.backends.cpu.get_cpu_capability()}"
    compiler = compiler_found()
    if compiler is None:
        return f"there is no C++ compiler: neither $CXX nor {', '.join(_COMPILERS)}"
    try:
        return NativeLibrary(_compiled(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(
            f"the native attention kernel could not be built with {compiler} or loaded, and attention on the CPU is "
            f"PyTorch's. SLICEMOD_NATIVE=0 saves the try. {said}",
            NativeLibraryWarning,
            stacklevel=2,
        )
        return f"{compiler} could not build it, or it could not be loaded: {said}"


def native_library() -> NativeLibrary | None:
    """The library, compiled for this processor where it is wanted for the first time; None where it cannot be."""
    found = _library_or_obstacle()
    return None if isinstance(found, str) else found


def native_obstacle() -> str | None:
    """Why there is no native kernel here, or None where there is one."""
    found = _library_or_obstacle()
    return found if isinstance(found, str) else None


def compiler_found() -> str | None:
    """The C++ compiler that the kernel is built with: $CXX, or the first of the usual ones."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS[1:]))), None)


def _compiled(compiler: str) -> Path:
    """The compiled library, from the cache where it is in there.

    Raises:
        OSError: the compiler cannot be run.
        subprocess.CalledProcessError: it ended with an error.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    # The model beside the flags: a compiler finds instructions that an old kernel's flags do not list.
    kind = [line for line in processor.splitlines() if line.startswith(("vendor_id", "cpu family", "model", "flags"))]
    flags = [*_FLAGS, *_CAPABILITIES[torch.backends.cpu.get_cpu_capability()]]
    sources = (path.read_bytes() for path in sorted([*SOURCES.glob("[a-z]*.h"), *SOURCES.glob("[a-z]*.cpp")]))
    parts = *sources, *(part.encode() for part in (version, *kind, *flags))
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    target = _cache_folder() / f"attention-{name}.so"
    if not target.exists():
        # Written beside its place and moved there whole: other processes may be about the same.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [compiler, *flags, "-o", str(built), str(SOURCES / "attention.cpp")]
            subprocess.run(command, capture_output=True, text=True, check=True)
            built.replace(target)
    return target


def _cache_folder() -> Path:
    given, caches = os.environ.get("SLICEMOD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path(caches or Path.home() / ".cache") / "slicemod")
    except RuntimeError as error:  # the user of a container need not have a home
        raise FileNotFoundError(f"{error} Set SLICEMOD_CACHE to a folder of your own.") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
