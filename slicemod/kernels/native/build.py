"""The native kernel's library: compiled for this processor when it is first wanted, and kept on disk.

`csrc/attention.cpp` needs an x86-64 processor with AVX2, FMA and F16C, Linux, and a C++ compiler, as `torch.compile`
does. What is missing is said by `native_obstacle`, and attention is then PyTorch's. The compiled library lies in
`$SLICEMOD_CACHE`, or `slicemod` in the user's cache folder, under a name made of the source, the compiler and the
processor, and its SHA-256 digest beside it. Since its code runs in this process, it is loaded only from a folder and a
file that nobody but the user can write to, and only as it was written. `SLICEMOD_NATIVE=0` does without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from slicemod.kernels.native.binding import NativeLibrary, WrongLibraryError

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno")
# PyTorch's word for the processor, which ATEN_CPU_CAPABILITY can lower, and flags for no more than that.
_CAPABILITIES = {"AVX2": ("-mno-avx512f",), "AVX512": ()}
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 600.0  # that a compiler may take; seconds are usual, a minute on a busy machine
_log = logging.getLogger("slicemod")  # a warning of its is printed where an application has not set up logging


class NativeLibraryWarning(RuntimeWarning):
    """The native kernel could not be compiled or loaded, and attention is PyTorch's."""


class CompilerError(Exception):
    """The compiler ended with an error, or did not end."""


@dataclass(frozen=True)
class _Obstacle:
    """Why there is no library; `failed` where there should be one."""

    reason: str
    failed: bool = False


@lru_cache(maxsize=1)
def _library_or_obstacle() -> NativeLibrary | _Obstacle:
    if os.environ.get("SLICEMOD_NATIVE", "1") == "0":
        return _Obstacle("SLICEMOD_NATIVE is 0")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return _Obstacle(f"it runs on Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _CAPABILITIES:
        return _Obstacle(f"it needs {' or '.join(_CAPABILITIES)}, and PyTorch finds {capability}")
    compiler = compiler_found()
    if compiler is None:
        return _Obstacle(f"there is no C++ compiler: neither $CXX nor {', '.join(_COMPILERS)}")
    try:
        try:
            return NativeLibrary(_compiled(compiler))
        except WrongLibraryError:
            return NativeLibrary(_compiled(compiler, anew=True))
    except (OSError, CompilerError) as error:
        return _Obstacle(f"{compiler} could not build it, or it could not be loaded: {error}", failed=True)


_warned_of: set[_Obstacle] = set()


def _found() -> NativeLibrary | _Obstacle:
    """The library or what is in its way, of which a failure is warned once, even where warnings are errors."""
    found = _library_or_obstacle()
    if isinstance(found, _Obstacle) and found.failed and found not in _warned_of:
        _warned_of.add(found)
        warnings.warn(
            f"there is no native attention kernel, and attention on the CPU is PyTorch's: {found.reason} "
            "SLICEMOD_NATIVE=0 saves the try.",
            NativeLibraryWarning,
            stacklevel=3,
        )
    return found


def native_library() -> NativeLibrary | None:
    """The library, compiled for this processor where it is wanted for the first time; None where it cannot be."""
    found = _found()
    return found if isinstance(found, NativeLibrary) else None


def native_obstacle() -> str | None:
    """Why there is no native kernel here, or None where there is one."""
    found = _found()
    return found.reason if isinstance(found, _Obstacle) else None


def build() -> Path:
    """Compile the library now, unless that was done before, so that no later process has to.

    Returns:
        Where it lies.

    Raises:
        RuntimeError: there can be none here; says why.
    """
    library = native_library()
    if library is None:
        raise RuntimeError(
            f"native attention: expected a machine that its library can be built on; on this one, {native_obstacle()}"
        )
    return library.path


def compiler_found() -> str | None:
    """The C++ compiler that the kernel is built with: $CXX, or the first of the usual ones."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS[1:]))), None)


def _compiled(compiler: str, *, anew: bool = False, seconds: float = _SECONDS) -> Path:
    """The compiled library, from the cache where it is in there as it was written.

    Args:
        compiler: its path.
        anew: compile it whatever is in the cache.
        seconds: that the compiler may take.

    Raises:
        OSError: the compiler cannot be run, or the cache is no place for code.
        CompilerError: it ended with an error, or did not end.
    """
    version = _ran([compiler, "--version"], seconds)
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    # The model beside the flags: a compiler finds instructions that an old kernel's flags do not list.
    kind = [line for line in processor.splitlines() if line.startswith(("vendor_id", "cpu family", "model", "flags"))]
    flags = [*_FLAGS, *_CAPABILITIES[torch.backends.cpu.get_cpu_capability()]]
    sources = (path.read_bytes() for path in sorted([*SOURCES.glob("[a-z]*.h"), *SOURCES.glob("[a-z]*.cpp")]))
    parts = *sources, *(part.encode() for part in (version, *kind, *flags))
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    target = _cache_folder() / f"attention-{name}.so"
    if anew or not _is_as_written(target):
        _log.warning("compiling slicemod's native attention kernel with %s into %s, once", compiler, target.parent)
        started = time.monotonic()
        # Written beside its place and moved there whole: other processes may be about the same.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built, digest = Path(folder) / target.name, Path(folder) / "digest"
            _ran([compiler, *flags, "-o", str(built), str(SOURCES / "attention.cpp")], seconds)
            built.chmod(0o755)
            digest.write_text(_digest(built), encoding="ascii")
            digest.replace(_digest_file(target))
            built.replace(target)
        _log.info("compiled it in %.0f s", time.monotonic() - started)
    return target


def _ran(command: list[str], seconds: float) -> str:
    """What a command prints; it is ended, with all that it started, when its time is up."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            printed, said = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompilerError(f"{command[0]} did not end within {seconds:g} s.") from error
            raise
    if process.returncode:
        raise CompilerError(f"{command[0]} ended with {process.returncode}: {said.strip()}")
    return printed


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _is_as_written(library: Path) -> bool:
    """The library is there, nobody else could have written it, and it has the bytes that were written."""
    try:
        if _others_may_write(library.lstat()):
            return False
        return _digest(library) == _digest_file(library).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return False


def _others_may_write(found: os.stat_result) -> bool:
    """Somebody but this user and root owns a file or folder, or may write to it."""
    return found.st_uid not in (os.getuid(), 0) or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _cache_folder() -> Path:
    """The folder of compiled libraries, made where there is none.

    Raises:
        OSError: there is no such folder, or somebody else could put code in there.
    """
    given, caches = os.environ.get("SLICEMOD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path(caches or Path.home() / ".cache") / "slicemod")
    except RuntimeError as error:  # the user of a container need not have a home
        raise FileNotFoundError(f"{error} Set SLICEMOD_CACHE to a folder of your own.") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    found = folder.stat()
    if _others_may_write(found):
        raise PermissionError(
            f"cache folder: expected one that user {os.getuid()} owns and nobody else may write to, since its code is "
            f"run; got {folder}, owned by {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}. Run chmod 700 on it, "
            "or set SLICEMOD_CACHE to a folder of your own."
        )
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(
                f"cache folder: expected one that only user {os.getuid()} can replace, since its code is run; got "
                f"{folder}, and everybody may write to {parent}. Set SLICEMOD_CACHE to a folder of your own."
            )
    return folder
