"""A configuration of the same kind as configs/digits.yaml that trains in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slicemod.training.commands.fit_command import fit

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 4


def tiny_config(**model: Any) -> dict[str, Any]:
    """configs/digits.yaml with small networks and few steps; ``model`` replaces arguments of the model."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
    config["autoencoder_training"].update(max_steps=2, batch_size=8)
    config["data"].update(batch_size=8, val_fraction=0.01)
    config["model"]["unet"]["init_args"].update(
        block_out_channels=[8, 16], norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2
    )
    config["model"]["class_embedder"]["init_args"].update(dim=12)
    config["model"]["autoencoder"]["init_args"].update(block_out_channels=[4, 4, 4], norm_num_groups=2)
    config["model"].update(model)
    config["trainer"].update(max_steps=STEPS, val_check_interval=3, check_val_every_n_epoch=None)
    config["trainer"]["callbacks"][0]["init_args"].update(every_n_train_steps=3)
    config["trainer"]["callbacks"] = [
        callback for callback in config["trainer"]["callbacks"] if "ProgressBar" not in callback["class_path"]
    ]
    config["trainer"]["enable_progress_bar"] = False
    return config


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """Writes a configuration as ``folder``/tiny.yaml and returns its path."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def train_tiny(folder: Path, *options: str, **model: Any) -> Path:
    """Runs `slicemod fit` in ``folder``, which must be the current one; returns the last checkpoint."""
    fit(["fit", "--config", write_config(folder, tiny_config(**model)), *options])
    return newest_checkpoint(folder)


def newest_checkpoint(folder: Path) -> Path:
    """The newest last*.ckpt that a run in ``folder`` wrote."""
    files = (folder / "runs" / "digits" / "checkpoints").glob("last*.ckpt")
    return max(files, key=lambda file: file.stat().st_mtime_ns)
