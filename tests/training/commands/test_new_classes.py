from __future__ import annotations

from pathlib import Path

import pytest

from slicemod.training.commands import new_classes
from slicemod.training.digits.digit_images import DigitsDataModule
from slicemod.user_error import UserError
from tests.training.tiny import tiny_config, write_config


def test_left_out_digits_are_in_no_split() -> None:
    data = DigitsDataModule(left_out=[4, 7])
    for name in ("train", "val", "test"):
        split = data.split(name)
        assert set(split.labels.tolist()) == set(range(10)) - {4, 7}
        assert len(split.images) == len(split.labels)
    with pytest.raises(UserError, match=r"data\.left_out must hold digits from 0 to 9, got \[10\]"):
        DigitsDataModule(left_out=[4, 10])


@pytest.mark.slow
def test_the_experiment_trains_what_is_missing_and_measures_both_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny_config())
    monkeypatch.setattr(new_classes, "BASE", ["fit", "--config", config, "--data.left_out", "[4, 7]"])
    monkeypatch.setattr(new_classes, "TUNED", ["fit", "--config", config])
    monkeypatch.setattr(new_classes, "WAYS", {"full": ["--trainer.max_steps", "2"]})
    monkeypatch.setattr(new_classes, "PER_DIGIT", 10)
    assert new_classes.main([]) == 0
    said = capsys.readouterr().out
    assert "base: new digits 0." in said
    assert "full: new digits 0." in said
    assert (tmp_path / "runs/new_classes/samples.png").exists()
    finished = tmp_path / "runs/new_classes/base/checkpoints/finished.ckpt"
    before = finished.stat().st_mtime_ns
    assert set(new_classes.run(["full"])) == {"base", "full"}
    assert finished.stat().st_mtime_ns == before
    assert new_classes.main(["half"]) == 2
    assert "expected ways out of full, got half" in capsys.readouterr().err
