from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slicemod.training.common.checkpoints import CheckpointError, read_safetensors, write_safetensors
from slicemod.training.stable_diffusion.tensor_cache import SEAL, TensorCache
from slicemod.user_error import UserError

KEY, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    """With an entry."""
    cache = TensorCache(tmp_path / "cache")
    cache.write(KEY, entry())
    return cache


def entry() -> dict[str, Tensor]:
    """Latents of three channels."""
    numbers = torch.arange(3 * 5 * 7).float().view(3, 5, 7)
    return {"mean": numbers, "std": numbers.to(torch.bfloat16) + 1}


def test_what_is_written_is_read(cache: TensorCache) -> None:
    assert cache.has(KEY)
    read = cache.read(KEY)
    assert read.keys() == entry().keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in entry().items())


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": torch.zeros(3, 7, 5)},
        {"mean": torch.zeros(2, 5, 7)},
        {"mean": entry()["mean"].double()},
        {"mean": entry()["mean"] + 1},
        {"mean": entry()["mean"] * torch.nan},
        {"more": torch.zeros(1)},
        {SEAL: torch.zeros(32, dtype=torch.uint8)},
        {SEAL: torch.zeros(1)},
    ],
    ids=["edges", "channels", "dtype", "values", "nan", "names", "digest", "digest's shape"],
)
def test_other_tensors_are_named_and_computed_again(
    changed: dict[str, Tensor], cache: TensorCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache.path(KEY)
    write_safetensors(path, read_safetensors(path)[0] | changed, {})
    with pytest.raises(CheckpointError, match="holds other tensors than slicemod wrote there") as told:
        cache.read(KEY)
    assert str(path) in str(told.value)
    assert not cache.has(KEY)
    assert str(path) in capsys.readouterr().err
    cache.write(KEY, entry())
    assert cache.has(KEY)


def test_a_file_without_a_digest_or_of_another_key_is_not_taken(cache: TensorCache) -> None:
    cache.path(OTHER).parent.mkdir()
    cache.path(OTHER).write_bytes(cache.path(KEY).read_bytes())
    assert not cache.has(OTHER)
    write_safetensors(cache.path(OTHER), entry(), {})
    assert not cache.has(OTHER)


@pytest.mark.parametrize("content", [b"", b"no tensors", (2**62).to_bytes(8, "little"), b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_holds_no_tensors_is_named(content: bytes, cache: TensorCache) -> None:
    cache.path(KEY).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"The cached file {cache.path(KEY)} cannot be read"):
        cache.read(KEY)
    assert not cache.has(KEY)


def test_a_missing_entry_is_named(cache: TensorCache) -> None:
    assert not cache.has(OTHER)
    with pytest.raises(CheckpointError, match=rf"The cached file {cache.path(OTHER)} cannot be read"):
        cache.read(OTHER)


def test_an_entry_that_is_read_can_be_replaced_and_changed_under_its_readers(cache: TensorCache) -> None:
    read = cache.read(KEY)
    with cache.path(KEY).open("r+b") as file:  # in place, which would change a mapped tensor
        file.seek(-16, os.SEEK_END)
        file.write(b"\xff" * 16)
    assert torch.equal(read["std"], entry()["std"])
    assert torch.equal(read["mean"], entry()["mean"])


def test_an_entry_that_another_process_wrote_first_is_kept(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: Path) -> None:
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    monkeypatch.setattr(Path, "replace", refused)  # as Windows refuses while another process reads the file
    before = cache.path(KEY).stat()
    cache.write(KEY, entry())
    assert cache.path(KEY).stat() == before
    with pytest.raises(UserError, match="cannot be written"):
        cache.write(OTHER, entry())


def test_a_file_is_flushed_through_a_handle_that_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.write(handle, b"")))  # fails on a read-only one
    TensorCache(tmp_path).write(KEY, entry())
    assert flushed == [0]
