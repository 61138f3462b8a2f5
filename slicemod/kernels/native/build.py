"""Compiles the native kernel's library for this processor when it is first needed, and keeps it on disk.

`csrc/attention.cpp` needs Linux, an x86-64 processor with AVX2, FMA and F16C, and a C++ compiler, as `torch.compile`
does. If one of these is missing, `native_obstacle` says which, and PyTorch's kernels compute the attention.
`SLICEMOD_NATIVE=0` does without the library. On Linux and macOS with a 64-bit Arm processor there is the library only
with `SLICEMOD_NATIVE=1`, because it was never timed there.

The compiled library is kept in `$SLICEMOD_CACHE`, or in `slicemod` below the user's cache folder. Its name is made of
the source, the compiler and the processor, and a file beside it has its SHA-256 digest. The library's code runs in this
process. So it is loaded only if nobody but the user can write to the file and the folder, and only if its digest is
right.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from slicemod.kernels.native.binding import NativeLibrary, WrongLibraryError

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno")
_X86, _LINUX_ARM, _MAC = ("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")
# GCC for Arm would order instructions so that sums leave the registers. Clang does not know this flag, and says so.
_KEEP_SUMS = "-fno-schedule-insns"
_FLAGS_OF = {
    _X86: ("-march=native",),
    # PyTorch's OpenMP runtime is found through the library that needs it. On x86-64 PyTorch shows it to all libraries.
    _LINUX_ARM: (
        *("-mcpu=native", _KEEP_SUMS),
        *(f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"),
    ),
    # Compilers for macOS take the first of Apple's processors, which has all that is used.
    _MAC: (_KEEP_SUMS, "-Wl,-undefined,dynamic_lookup"),
}
# PyTorch's name for what the processor can do, and the compiler's flags for no more than that. (The environment
# variable ATEN_CPU_CAPABILITY can lower it.)
_CAPABILITIES = {"AVX2": ("-mno-avx512f",), "AVX512": ()}
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 600.0  # most time for the compiler; it usually takes seconds, and a minute on a busy machine
_log = logging.getLogger("slicemod")  # its warnings are printed even if the application has not set up logging


class NativeLibraryWarning(RuntimeWarning):
    """The native kernel could not be compiled or loaded, so PyTorch's kernels compute the attention."""


class CompilerError(Exception):
    """The compiler ended with an error, or did not end."""


@dataclass(frozen=True)
class _Obstacle:
    """Why there is no library. `failed` means that there should be one, but compiling or loading it failed."""

    reason: str
    failed: bool = False


@lru_cache(maxsize=1)
def _library_or_obstacle() -> NativeLibrary | _Obstacle:
    asked = os.environ.get("SLICEMOD_NATIVE")
    if asked == "0":
        return _Obstacle("SLICEMOD_NATIVE is 0")
    machine = _machine()
    if machine not in _FLAGS_OF:
        return _Obstacle(
            f"it runs on Linux on x86-64, and on Linux and macOS on 64-bit Arm; this is {' on '.join(machine)}"
        )
    if machine != _X86 and asked != "1":
        return _Obstacle("its speed on Arm was never measured; SLICEMOD_NATIVE=1 in the environment turns it on")
    capability = torch.backends.cpu.get_cpu_capability()
    if machine == _X86 and capability not in _CAPABILITIES:
        return _Obstacle(f"it needs {' or '.join(_CAPABILITIES)}, and PyTorch finds {capability}")
    compiler = compiler_found()
    if compiler is None:
        if given := os.environ.get("CXX"):
            reason = f"$CXX: expected the command of a C++ compiler; got {given!r}, which cannot be run."
            return _Obstacle(reason, failed=True)
        return _Obstacle(f"there is no C++ compiler: $CXX is not set, and none of {', '.join(_COMPILERS)} is there")
    try:
        try:
            return NativeLibrary(compiled(compiler))
        except WrongLibraryError:
            return NativeLibrary(compiled(compiler, anew=True))
    except (OSError, CompilerError) as error:
        return _Obstacle(f"{shlex.join(compiler)} could not build it, or it could not be loaded: {error}", failed=True)


_warned_of: set[_Obstacle] = set()


def _found() -> NativeLibrary | _Obstacle:
    """The library, or why there is none. A failure is warned of once, even if warnings are errors."""
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
    """The library, which is compiled at its first use; None if there can be none here."""
    found = _found()
    return found if isinstance(found, NativeLibrary) else None


def native_obstacle() -> str | None:
    """Why there is no native kernel on this machine; None if there is one."""
    found = _found()
    return found.reason if isinstance(found, _Obstacle) else None


def build() -> Path:
    """Compile the library now if it is not compiled yet, so that no later process has to.

    Returns:
        The path of the compiled library.

    Raises:
        RuntimeError: there can be no library on this machine. The message says why.
    """
    library = native_library()
    if library is None:
        raise RuntimeError(
            f"native attention: expected a machine that its library can be built on; on this one, {native_obstacle()}"
        )
    return library.path


def compiler_found() -> list[str] | None:
    """The words of the command that compiles the kernel: $CXX, or without it the first usual compiler.

    None if it is not installed.
    """
    given = os.environ.get("CXX")
    try:
        commands = [shlex.split(given)] if given else [[name] for name in _COMPILERS]
    except ValueError:  # an open quotation
        return None
    for program, *more in filter(None, commands):
        if path := shutil.which(program):
            return [path, *more]
    return None


def compiled(compiler: Sequence[str], *, anew: bool = False, seconds: float = _SECONDS) -> Path:
    """The path of the compiled library. It is taken from the cache if it is there and has the right digest.

    Args:
        compiler: the words of its command.
        anew: compile the library whatever is in the cache.
        seconds: how long the compiler may take.

    Raises:
        OSError: the compiler cannot be run, or the cache folder is not safe for code.
        CompilerError: the compiler ended with an error, or did not end in time.
    """
    version = _ran([*compiler, "--version"], seconds)
    flags = _flags()
    sources = (path.read_bytes() for path in sorted([*SOURCES.glob("[a-z]*.h"), *SOURCES.glob("[a-z]*.cpp")]))
    parts = *sources, *(part.encode() for part in (version, *compiler[1:], *_processor(), *flags))
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    target = _cache_folder() / f"attention-{name}.so"
    if anew or not _is_as_written(target):
        _log.warning(
            "compiling slicemod's native attention kernel with %s into %s, once", shlex.join(compiler), target.parent
        )
        started = time.monotonic()
        # Compiled in a folder beside its final place, and then moved: other processes may be doing the same.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built, digest = Path(folder) / target.name, Path(folder) / "digest"
            _ran([*compiler, *flags, "-o", str(built), str(SOURCES / "attention.cpp")], seconds)
            built.chmod(0o755)
            digest.write_text(_digest(built), encoding="ascii")
            digest.replace(_digest_file(target))
            built.replace(target)
        _log.info("compiled it in %.0f s", time.monotonic() - started)
    return target


def _machine() -> tuple[str, str]:
    return platform.system(), platform.machine()


def _flags() -> list[str]:
    """The compiler's flags for this machine."""
    machine = _machine()
    lowered = _CAPABILITIES[torch.backends.cpu.get_cpu_capability()] if machine == _X86 else ()
    return [*_FLAGS, *_FLAGS_OF[machine], *lowered]


def _processor() -> list[str]:
    """What the library's code depends on beside the compiler: nothing on macOS."""
    if _machine() == _MAC:
        return []
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    # The model too, not only the flags: a compiler may find instructions that an old Linux does not list in the flags.
    x86, arm = ("vendor_id", "cpu family", "model", "flags"), ("CPU ", "Features")
    return [line for line in first.splitlines() if line.startswith((*x86, *arm))]


def _ran(command: list[str], seconds: float) -> str:
    """The output of a command. If it takes too long, it is killed together with the processes that it started."""
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
    """The library exists, nobody else could have written it, and it has the digest that was written with it."""
    try:
        if _others_may_write(library.lstat()):
            return False
        return _digest(library) == _digest_file(library).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return False


def _others_may_write(found: os.stat_result) -> bool:
    """A file or folder is owned by somebody who is not this user or root, or others may write to it."""
    return found.st_uid not in (os.getuid(), 0) or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _cache_folder() -> Path:
    """The folder of compiled libraries. It is made if it does not exist.

    Raises:
        OSError: the folder cannot be made, or somebody else could put code into it.
    """
    given, caches = os.environ.get("SLICEMOD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path(caches or Path.home() / ".cache") / "slicemod")
    except RuntimeError as error:  # in a container, the user may have no home folder
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
