from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from torch import nn

from slicemod.training.common.checkpoints import (
    CheckpointError,
    load_strictly,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)


class Intruder:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch intruded",)


@pytest.mark.parametrize("written_by", ["pickle", "torch"])
def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_by: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    if written_by == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Intruder()}))
    else:
        torch.save({"state_dict": Intruder()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is refused"):
        read_checkpoint(path)
    assert not (tmp_path / "intruded").exists()


def test_what_lightning_kept_beside_the_tensors_of_a_published_checkpoint_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Intruder, "__module__", "pytorch_lightning.callbacks.model_checkpoint")
    monkeypatch.setattr(Intruder, "__reduce__", object.__reduce__)
    module = ModuleType(Intruder.__module__)
    vars(module)["Intruder"] = Intruder
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", Intruder.__module__):
            patch.setitem(sys.modules, name, module)
        callbacks = {Intruder: {"best_model_score": numpy.float64(0.5), "kept": Intruder()}}
        torch.save({"state_dict": {"weight": torch.ones(3)}, "callbacks": callbacks}, "published.ckpt")
    assert torch.equal(read_checkpoint("published.ckpt")["state_dict"]["weight"], torch.ones(3))
    torch.save({"state_dict": {}, "callbacks": numpy.float64(0.5), "evil": os.system}, "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is refused"):
        read_checkpoint("evil.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(500)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_safetensors_cut_short_are_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, {"weight": torch.zeros(500)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("read", [read_checkpoint, read_safetensors])
def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, read: type) -> None:
    with pytest.raises(CheckpointError, match=r"none\.ckpt .* found nothing"):
        read(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="found a folder"):
        read(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"weights": torch.zeros(2)}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="expected a dictionary with a `state_dict`"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_safetensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    write_safetensors(path, {"weight": torch.arange(6.0).reshape(2, 3).T}, {"psnr": "31.5"})
    tensors, metadata = read_safetensors(path)
    assert torch.equal(tensors["weight"], torch.arange(6.0).reshape(2, 3).T)
    assert metadata == {"psnr": "31.5"}
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_strict_loading_names_missing_unexpected_and_reshaped_tensors_and_loads_nothing() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"1 keys are missing: bias; 1 keys are unexpected: scale; 1 tensors"):
        load_strictly(module, {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, "base.ckpt")
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("content", [b"hello\n", b"\x80\x02}q\x00(X", b"PK\x03\x04 not a zip", b""])
def test_a_file_of_anything_else_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"text\.ckpt"):
        read_checkpoint(tmp_path / "text.ckpt")


def test_a_value_that_is_no_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"weight \(expected \(2, 3\), got a int\)"):
        load_strictly(nn.Linear(3, 2, bias=False), {"weight": 5}, "x.ckpt")  # type: ignore[dict-item]
