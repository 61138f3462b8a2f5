"""The commands of docs/fine-tuning.md run, from top to bottom, with small random models."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from slicemod.bench import bench_command
from slicemod.bench.workloads import LayerWork
from slicemod.cli import main
from slicemod.training.common.checkpoints import read_safetensors, write_safetensors
from slicemod.training.stable_diffusion.compvis_layout import (
    autoencoder_to_compvis,
    text_encoders_to_compvis,
    unet_to_compvis,
)
from slicemod.training.stable_diffusion.pretrained import Pretrained
from tests.training.tiny_stable_diffusion import (
    letter_encoders,
    tiny_config,
    write_config,
    write_images,
    write_text_parts,
    write_tiny_model,
)

GUIDE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")


def commands() -> list[list[str]]:
    """The `slicemod` commands of the guide for one machine with one device."""
    text = GUIDE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    slicemod (.+)$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines if "--trainer.devices" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sd15_full.yaml", pytest.param("sd15_lora.yaml", marks=NEEDS_PEFT)])
def test_the_commands_of_the_guide_run(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slicemod.training.stable_diffusion.lightning_module.load_text_encoders", letter_encoders)
    monkeypatch.setattr(bench_command, "find_works", lambda *_, **__: [LayerWork("small", 64, 1, 67, 26, 2, 13)])
    source = write_tiny_model(Path("stable-diffusion-v1-5/stable-diffusion-v1-5"), "sd15")
    write_text_parts(source)
    pretrained = Pretrained(str(source))
    unet, autoencoder = pretrained.load_unet(), pretrained.load_autoencoder()
    text, _ = read_safetensors(source / "text_encoder" / "model.safetensors")
    file = unet_to_compvis(unet.state_dict(), unet.config) | text_encoders_to_compvis([text], openclip=False)
    write_safetensors(
        "v1-5.safetensors", file | autoencoder_to_compvis(autoencoder.state_dict(), autoencoder.config), {}
    )
    content = tiny_config(config, source, write_images(tmp_path / "photos"), trainer={"max_steps": 2})
    del content["trainer"]["callbacks"][0]["init_args"]["dirpath"]  # the run's own
    content["run"] = "sd15_lora"
    tiny = write_config(tmp_path, content)

    ran = 0
    for command in commands():
        if "--help" in command or ("lora" in command and config != "sd15_lora.yaml"):
            continue
        assert main([tiny if word == "configs/sd15_lora.yaml" else word for word in command]) == 0, capsys.readouterr()
        ran += 1
    assert ran >= 7
    assert Path("snow.png").stat().st_size > 0
    assert Path("model.safetensors").stat().st_size > 0
    assert Path("pipeline/model_index.json").exists()
    assert Path("dog.safetensors").exists() == (config == "sd15_lora.yaml")


def test_the_guide_names_files_that_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (GUIDE.parent / target).exists()] == []
