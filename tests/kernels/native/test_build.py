"""The native kernel is compiled once for a machine, and what keeps it from that is said."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slicemod.kernels.native import build as module
from slicemod.kernels.native.build import NativeLibraryWarning, native_library, native_obstacle
from slicemod.kernels.native.operators import native_attention

needs_native = pytest.mark.skipif(native_library() is None, reason=f"no native kernel: {native_obstacle()}")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of its own, and no memory of what was found before."""
    monkeypatch.setenv("SLICEMOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SLICEMOD_NATIVE", raising=False)
    module._library_or_obstacle.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    module._library_or_obstacle.cache_clear()


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


@needs_native
def test_it_is_compiled_into_the_cache_and_found_there_again(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_library() is not None
    (built,) = (anew / "cache").iterdir()
    assert built.suffix == ".so"
    assert stat.S_IMODE((anew / "cache").stat().st_mode) & 0o077 == 0
    module._library_or_obstacle.cache_clear()
    before = built.stat().st_mtime_ns
    assert native_library() is not None
    assert built.stat().st_mtime_ns == before


def test_other_files_beside_the_source_are_not_read(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = anew / "csrc"
    shutil.copytree(module.SOURCES, sources)
    monkeypatch.setattr(module, "SOURCES", sources)
    stub = str(compiler_stub(anew, "touch $built"))
    once = module._compiled(stub)
    (sources / ".attention.cpp.swp").write_bytes(b"\xff\xfe")
    (sources / ".#forward.h").symlink_to(anew / "nowhere")
    (sources / "__pycache__").mkdir()
    assert module._compiled(stub) == once
    (sources / "forward.h").write_text("// another", encoding="utf-8")
    assert module._compiled(stub) != once


def test_a_lowered_capability_of_pytorchs_is_kept_to(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = compiler_stub(anew, f"echo $all > {anew / 'asked'}; touch $built")
    for capability, lowered in (("AVX512", False), ("AVX2", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        module._compiled(str(stub))
        assert ("-mno-avx512f" in (anew / "asked").read_text(encoding="utf-8")) == lowered


@needs_native
def test_another_process_finds_it_too(anew: Path) -> None:
    assert native_library() is not None
    program = "from slicemod.kernels.native.build import native_library; assert native_library() is not None"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=dict(os.environ))
    assert len(list((anew / "cache").iterdir())) == 1


def test_it_can_be_switched_off(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICEMOD_NATIVE", "0")
    assert native_library() is None
    assert native_obstacle() == "SLICEMOD_NATIVE is 0"


def test_other_processors_are_named(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native_obstacle() == "it needs AVX2 or AVX512, and PyTorch finds DEFAULT"


def test_other_systems_are_named(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert "Darwin on arm64" in str(native_obstacle())


def test_without_a_compiler_there_is_none(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(anew))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in str(native_obstacle())


def test_a_compiler_that_fails_is_quoted_once(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler_stub(anew, "echo 'no room for tiles' >&2; exit 1")))
    with pytest.warns(NativeLibraryWarning, match="no room for tiles"):
        assert native_library() is None
    assert "no room for tiles" in str(native_obstacle())
    assert list((anew / "cache").iterdir()) == []


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_folder_the_cache_is_asked_for(anew: Path, x86: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLICEMOD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("CXX", "true")
    with pytest.warns(NativeLibraryWarning, match="Set SLICEMOD_CACHE"):
        assert native_library() is None
    monkeypatch.setenv("SLICEMOD_CACHE", str(anew / "given"))
    assert module._cache_folder() == anew / "given"


def test_a_graph_from_another_machine_says_what_is_missing(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICEMOD_NATIVE", "0")
    query = torch.randn(1, 2, 17, 8)
    with pytest.raises(RuntimeError, match="SLICEMOD_NATIVE is 0"):
        native_attention(query, query, query, 0.3, False)
