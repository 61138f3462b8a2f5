"""The native kernel is compiled once for a machine, and what keeps it from that is said."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from slicemod.kernels.native import build, operators
from slicemod.kernels.native.build import CompilerError, NativeLibraryWarning, compiled, compiler_found

TRUE_LIBRARY, TRUE_COMPILER = build.native_library(), compiler_found()
needs_native = pytest.mark.skipif(TRUE_LIBRARY is None, reason=f"no native kernel: {build.native_obstacle()}")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder, in which `cache` is that of compiled libraries."""
    monkeypatch.setenv("SLICEMOD_CACHE", str(tmp_path / "cache"))
    if os.environ.get("SLICEMOD_NATIVE") == "0":
        monkeypatch.delenv("SLICEMOD_NATIVE")
    return tmp_path


def new_process() -> Any:
    """The module as a new process has it: it has not looked for a library, and has warned of nothing."""
    spec = find_spec(build.__name__)
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NativeLibraryWarning = NativeLibraryWarning
    return module


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that the kernel is for, whatever this one is."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def compiler_stub(folder: Path, does: str) -> Path:
    """A program in a compiler's place, which knows what it is asked for as $all and where to put it as $built."""
    stub = folder / "stub"
    finds = 'all="$*"\nwhile [ "$1" != -o ]; do shift; done\nbuilt="$2"'
    stub.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{finds}\n{does}\n', encoding="utf-8")
    stub.chmod(0o700)
    return stub


@pytest.fixture
def quick(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes no time, since it copies what the true one made."""
    true, compiler = TRUE_LIBRARY, TRUE_COMPILER
    assert true is not None
    assert compiler is not None
    stub = compiler_stub(anew, f"cp {true.path} $built")
    words = stub.read_text(encoding="utf-8").replace("&& exit 0", f"&& exec {shlex.join(compiler)} --version")
    stub.write_text(words, encoding="utf-8")
    monkeypatch.setenv("CXX", str(stub))


@pytest.mark.slow
@needs_native
def test_it_is_compiled_into_the_cache_and_found_there_again(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_process()
    assert first.native_library() is not None
    built, digest = sorted((anew / "cache").iterdir(), reverse=True)
    assert (built.suffix, digest.suffix) == (".so", ".sha256")
    assert first.build() == built
    assert stat.S_IMODE((anew / "cache").stat().st_mode) & 0o077 == 0
    before = built.stat().st_mtime_ns
    assert new_process().native_library() is not None
    assert built.stat().st_mtime_ns == before


def test_other_files_beside_the_source_are_not_read(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = anew / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    stub = str(compiler_stub(anew, "touch $built"))
    once = compiled([stub])
    (sources / ".attention.cpp.swp").write_bytes(b"\xff\xfe")
    (sources / ".#forward.h").symlink_to(anew / "nowhere")
    (sources / "__pycache__").mkdir()
    assert compiled([stub]) == once
    (sources / "forward.h").write_text("// another", encoding="utf-8")
    assert compiled([stub]) != once


def test_a_lowered_capability_of_pytorchs_is_kept_to(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = compiler_stub(anew, f"echo $all > {anew / 'asked'}; touch $built")
    for capability, lowered in (("AVX512", False), ("AVX2", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        compiled([str(stub)])
        assert ("-mno-avx512f" in (anew / "asked").read_text(encoding="utf-8")) == lowered


@needs_native
def test_another_process_finds_it_too(anew: Path, quick: None) -> None:
    assert new_process().native_library() is not None
    program = "from slicemod.kernels.native.build import native_library; assert native_library() is not None"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=dict(os.environ))
    assert len(list((anew / "cache").iterdir())) == 2


def test_it_can_be_switched_off(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICEMOD_NATIVE", "0")
    process = new_process()
    assert process.native_library() is None
    assert process.native_obstacle() == "SLICEMOD_NATIVE is 0"


def test_other_processors_are_named(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert new_process().native_obstacle() == "it needs AVX2 or AVX512, and PyTorch finds DEFAULT"


def test_other_systems_are_named(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    assert "this is Windows on AMD64" in new_process().native_obstacle()


@pytest.fixture(params=[("Linux", "aarch64"), ("Darwin", "arm64")], ids="-".join)
def arm(request: pytest.FixtureRequest, anew: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A machine with an Arm processor. macOS has no /proc."""
    system, machine = request.param
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.delenv("SLICEMOD_NATIVE", raising=False)
    tell_processor(monkeypatch, ARM_PROCESSOR if system == "Linux" else None)
    return system, machine


ARM_PROCESSOR = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd0c
"""


def tell_processor(monkeypatch: pytest.MonkeyPatch, words: str | None) -> None:
    read = Path.read_text

    def read_text(path: Path, **how: Any) -> str:
        if path != Path("/proc/cpuinfo"):
            return read(path, **how)
        if words is None:
            raise FileNotFoundError(path)
        return words

    monkeypatch.setattr(Path, "read_text", read_text)


def test_on_arm_it_is_off_until_it_is_asked_for(arm: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    off = "its speed on Arm was never measured; SLICEMOD_NATIVE=1 in the environment turns it on"
    assert new_process().native_obstacle() == off
    monkeypatch.setenv("SLICEMOD_NATIVE", "1")
    monkeypatch.setenv("CXX", "true")  # it makes no library
    with pytest.warns(NativeLibraryWarning, match="true could not build it"):
        assert new_process().native_obstacle() != off


def test_compilers_for_arm_get_flags_that_they_know(arm: tuple[str, str], anew: Path) -> None:
    compiled([str(compiler_stub(anew, f"echo $all > {anew / 'asked'}; touch $built"))])
    asked = (anew / "asked").read_text(encoding="utf-8").split()
    linux = arm[0] == "Linux"
    assert ("-mcpu=native" in asked, "-ltorch_cpu" in asked) == (linux, linux)
    assert ("-Wl,-undefined,dynamic_lookup" in asked) == (not linux)
    assert "-march=native" not in asked


def test_every_arm_processor_on_linux_has_its_own_library(
    arm: tuple[str, str], anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = str(compiler_stub(anew, "touch $built"))
    once = compiled([stub])
    for old, new, same in (("243.75", "200.00", True), ("0xd0c", "0xd40", arm[0] != "Linux")):
        tell_processor(monkeypatch, ARM_PROCESSOR.replace(old, new))
        assert (compiled([stub]) == once) == same


def test_without_a_compiler_there_is_none(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(anew))
    monkeypatch.delenv("CXX", raising=False)
    assert (
        new_process().native_obstacle()
        == "there is no C++ compiler: $CXX is not set, and none of c++, g++, clang++ is there"
    )


@pytest.mark.parametrize("words", ["/nowhere/g++", "no-such-cache g++", " ", "'g++"])
def test_a_given_compiler_that_cannot_be_run_is_named_and_no_other_is_taken(
    words: str, anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", words)
    with pytest.warns(NativeLibraryWarning, match=re.escape(f"expected the command of a C++ compiler; got {words!r}")):
        assert new_process().native_library() is None


def test_a_compiler_can_be_given_as_a_command_of_several_words(
    anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := anew / "with space").mkdir()
    stub = compiler_stub(folder, f"echo $NUMBER > {anew / 'asked'}; touch $built")
    built = set()
    for number in ("5", "7"):
        monkeypatch.setenv("CXX", f"env NUMBER={number} '{stub}'")
        compiler = compiler_found()
        assert compiler == [shutil.which("env"), f"NUMBER={number}", str(stub)]
        built.add(compiled(compiler))
        assert (anew / "asked").read_text(encoding="utf-8") == f"{number}\n"
    assert len(built) == 2


def test_a_compiler_that_fails_is_quoted_once(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler_stub(anew, "echo 'no room for tiles' >&2; exit 1")))
    with pytest.warns(NativeLibraryWarning, match="no room for tiles"):
        assert (process := new_process()).native_library() is None
    assert "no room for tiles" in process.native_obstacle()
    assert list((anew / "cache").iterdir()) == []


def test_a_compiler_that_fails_is_tried_once_where_warnings_are_errors(
    anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = anew / "tries"
    monkeypatch.setenv("CXX", str(compiler_stub(anew, f"echo one >> {tries}; exit 1")))
    process = new_process()
    with pytest.raises(NativeLibraryWarning):
        process.native_library()
    assert process.native_library() is None
    assert process.native_library() is None
    assert tries.read_text(encoding="utf-8") == "one\n"


def test_a_compiler_may_speak_latin_1(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler_stub(anew, "printf 'Datei fehlt f\\374r' >&2; exit 1")))
    with pytest.warns(NativeLibraryWarning, match="Datei fehlt f\ufffdr"):
        assert new_process().native_library() is None


def test_a_compiler_that_hangs_is_ended_with_all_it_started(anew: Path, x86: None) -> None:
    stub, alive = compiler_stub(anew, f"(sleep 2; touch {anew / 'alive'}) & sleep 600"), anew / "alive"
    started = time.monotonic()
    with pytest.raises(CompilerError, match=r"did not end within 0\.5 s"):
        compiled([str(stub)], seconds=0.5)
    assert time.monotonic() - started < 60
    time.sleep(2.5)
    assert not alive.exists()


def spoil_by_truncating(library: Path) -> None:
    with library.open("rb+") as file:
        file.truncate(5000)


def spoil_by_another_library(library: Path) -> None:
    library.unlink()
    assert TRUE_COMPILER is not None
    command = [*TRUE_COMPILER, "-x", "c", "-shared", "-fPIC", "-o", str(library), "-"]
    subprocess.run(command, input=b"int x;", check=True)
    library.chmod(0o755)


def spoil_by_another_library_and_digest(library: Path) -> None:
    spoil_by_another_library(library)
    library.with_suffix(".sha256").write_text(hashlib.sha256(library.read_bytes()).hexdigest(), encoding="ascii")


def spoil_by_leave_to_write(library: Path) -> None:
    library.chmod(0o777)


def spoil_by_losing_the_digest(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


@needs_native
@pytest.mark.parametrize(
    "spoil",
    [
        spoil_by_truncating,
        spoil_by_another_library,
        spoil_by_another_library_and_digest,
        spoil_by_leave_to_write,
        spoil_by_losing_the_digest,
    ],
)
def test_a_library_that_is_not_as_it_was_written_is_compiled_again(
    quick: None, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    compiler = compiler_found()
    assert compiler is not None
    built = compiled(compiler)  # not loaded: what is mapped must not be truncated
    once = built.read_bytes()
    spoil(built)
    caplog.clear()
    assert new_process().native_library().vector_lanes in (4, 8, 16)
    (said,) = caplog.messages
    assert said.startswith("compiling slicemod's native attention kernel")
    assert built.read_bytes() == once
    assert stat.S_IMODE(built.stat().st_mode) == 0o755
    assert compiled(compiler) == built
    assert caplog.messages == [said]  # and not a second time


def test_a_folder_that_others_may_write_to_is_refused_by_name(
    anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = anew / "cache"
    folder.mkdir()
    for mode in (0o770, 0o707, 0o1777):
        folder.chmod(mode)
        with pytest.warns(
            NativeLibraryWarning, match=f"got {folder}, owned by {os.getuid()}, mode {mode:o}. Run chmod"
        ):
            assert new_process().native_library() is None
    assert list(folder.iterdir()) == []


def test_a_folder_that_everybody_can_replace_is_refused_by_name(
    anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = anew / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("SLICEMOD_CACHE", str(shared / "cache"))
    with pytest.warns(NativeLibraryWarning, match=f"everybody may write to {shared}"):
        assert new_process().native_library() is None
    shared.chmod(0o1777)  # as /tmp: nobody can replace what is another's
    assert compiled([str(compiler_stub(anew, "touch $built"))]).parent == shared / "cache"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_library_or_folder_of_another_user_is_not_trusted(anew: Path, x86: None) -> None:
    stub = str(compiler_stub(anew, "touch $built"))
    built = compiled([stub])
    os.chown(built, 12345, -1)
    assert compiled([stub]) == built
    assert built.stat().st_uid == 0
    os.chown(built.parent, 12345, -1)
    with pytest.raises(PermissionError, match="owned by 12345"):
        compiled([stub])


def test_a_compilation_is_said_and_a_second_process_says_nothing(
    anew: Path, x86: None, caplog: pytest.LogCaptureFixture
) -> None:
    stub = str(compiler_stub(anew, "touch $built"))
    compiled([stub])
    (said,) = caplog.records
    assert (said.name, said.levelname) == ("slicemod", "WARNING")
    assert f"compiling slicemod's native attention kernel with {stub} into {anew / 'cache'}" in said.getMessage()
    compiled([stub])
    assert len(caplog.records) == 1


def test_building_ahead_of_time_says_what_is_in_the_way(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICEMOD_NATIVE", "0")
    with pytest.raises(RuntimeError, match="SLICEMOD_NATIVE is 0"):
        new_process().build()


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_folder_the_cache_is_asked_for(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLICEMOD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("CXX", "true")
    with pytest.warns(NativeLibraryWarning, match="Set SLICEMOD_CACHE"):
        assert new_process().native_library() is None
    monkeypatch.setenv("SLICEMOD_CACHE", str(anew / "given"))
    assert compiled([str(compiler_stub(anew, "touch $built"))]).parent == anew / "given"


def test_a_graph_from_another_machine_says_what_is_missing(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICEMOD_NATIVE", "0")
    process, query = new_process(), torch.randn(1, 2, 17, 8)
    for name in ("native_library", "native_obstacle"):
        monkeypatch.setattr(operators, name, getattr(process, name))
    with pytest.raises(RuntimeError, match="SLICEMOD_NATIVE is 0"):
        operators.native_attention(query, query, query, None, None, 0.0, False, 0.3, False)
