"""The native kernel's library: compiled for this processor when it is first wanted, and kept on disk.

`csrc/attention.cpp` needs an x86-64 processor with AVX2, FMA and F16C, Linux, and a C++ compiler, as `torch.compile`
does. What is missing is said by `native_obstacle`, and attention is then PyTorch's. The compiled library lies in
`$SLICEMOD_CACHE`, or `slicemod` in the user's cache folder, under a name made of the source, the compiler and the
processor. `SLICEMOD_NATIVE=0` does without it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from slicemod.kernels.native.binding import NativeLibrary

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno")
# PyTorch's word for the processor, which ATEN_CPU_CAPABILITY can lower, and flags for no more than that.
_CAPABILITIES = {"AVX2": ("-mno-avx512f",), "AVX512": ()}
_COMPILERS = ("c++", "g++", "clang++")


class NativeLibraryWarning(RuntimeWarning):
    """The native kernel could not be compiled, and attention is PyTorch's."""


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
