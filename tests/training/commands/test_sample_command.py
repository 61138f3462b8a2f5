from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slicemod.cli import BAD_INPUT, main
from slicemod.training.stable_diffusion.samplers import SAMPLERS
from tests.training.tiny_stable_diffusion import whole_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small random model with text encoders."""
    folder = tmp_path_factory.mktemp("sample")
    return write_checkpoint(folder / "run.ckpt", whole_model(folder / "sd15", "sd15"), trained="attention")


def draw(checkpoint: Path, out: Path, *options: str) -> Any:
    """The picture that `slicemod sample` writes, (height, width, 3)."""
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "a cat", "--out", str(out), "--steps", "3"]
    assert main(["sample", *arguments, *options]) == 0
    return np.asarray(Image.open(out))


def test_every_option_of_a_prompt_changes_the_picture_and_the_seed_fixes_it(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    plain = draw(checkpoint, out)
    assert np.array_equal(plain, draw(checkpoint, out))
    changes = (["--seed", "1"], ["--negative-prompt", "dog"], ["--guidance", "3"], ["--steps", "4"],
               ["--scheduler", "euler"], ["--max-tokens", "150"])  # fmt: skip
    pictures = [plain, *(draw(checkpoint, out, *change) for change in changes)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert np.array_equal(draw(checkpoint, out, "--negative-prompt", ""), plain)  # of SD1.x and SD2.x


def test_every_scheduler_draws_and_the_seed_fixes_what(checkpoint: Path, tmp_path: Path) -> None:
    pictures = {name: draw(checkpoint, tmp_path / "out.png", "--scheduler", name) for name in SAMPLERS}
    assert {picture.shape for picture in pictures.values()} == {(16, 16, 3)}
    assert min(picture.std() for picture in pictures.values()) > 10
    for name in ("ddpm", "dpm++_sde", "euler_a"):  # which add noise at each step
        assert np.array_equal(pictures[name], draw(checkpoint, tmp_path / "out.png", "--scheduler", name))


def test_the_second_image_is_that_of_the_next_seed(checkpoint: Path, tmp_path: Path) -> None:
    both = draw(checkpoint, tmp_path / "both.png", "--seed", "7", "--count", "2", "--scheduler", "euler_a")
    second = draw(checkpoint, tmp_path / "second.png", "--seed", "8", "--scheduler", "euler_a")
    assert second.shape == (16, 16, 3)
    assert np.array_equal(both[:16, -16:], second)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", "a cat", "--class", "3"], "--class cannot be used: "),
        (["--class", "3"], "--prompt is missing"),
        (["--prompt", "a cat", "--scheduler", "plms"], "'ddim'"),
        (["--prompt", "a cat", "--max-tokens", "100"], "multiple of 75, which CLIP takes at once, got 100: use 150"),
        (["--prompt", "a cat", "--max-tokens", "0"], "multiple of 75, which CLIP takes at once, got 0: use 75"),
        (["--prompt", "a cat", "--count", "0"], "--count must be at least 1, got 0"),
        (["--prompt", "a cat", "--out", "no/such/a.png"], "--out: expected a file in a folder that exists; got"),
        (["--prompt", "a cat", "--steps", "0"], "from 1 to 999, got 0"),
        (["--prompt", "a cat", "--steps", "1000"], "from 1 to 999, got 1000"),
        (["--prompt", "a cat", "--height", "0"], "multiples of 4 pixels"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    options: list[str], named: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.png")
    assert main(["sample", "--checkpoint", str(checkpoint), "--out", out, *options]) == BAD_INPUT
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt", "--scheduler", "--source"])
def test_a_class_goes_with_no_option_of_a_prompt(
    option: str, base_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(base_checkpoint), "--class", "3", "--out", str(tmp_path / "out.png"), option, "ddim"]
    assert main(["sample", *options]) == BAD_INPUT
    assert f"{option} cannot be used: {base_checkpoint} is a model of the digits" in capsys.readouterr().err


def test_a_prompt_that_is_cut_is_told(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(checkpoint, tmp_path / "out.png")
    assert "tokens" not in capsys.readouterr().err
    draw(checkpoint, tmp_path / "out.png", "--prompt", "abcdefghijkl", "--negative-prompt", "bad")
    assert "1 of 2 prompts have more than 9 tokens and are cut there" in capsys.readouterr().err
