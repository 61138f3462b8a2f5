"""Small works of every kind, and results to draw and print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slicemod.bench import timing
from slicemod.bench.calls import plain_call
from slicemod.bench.comparing import LeftOut, Measurement, Setting
from slicemod.bench.results import Results
from slicemod.bench.work import Work
from slicemod.bench.workloads import LayerWork, UnetWork

INFERENCE, TRAINING = Setting("float32", "inference"), Setting("float32", "training")

SELF = LayerWork("self", 72, 1, 67, 26, 2, 13)
CROSS = LayerWork("cross", 72, 2, 53, 26, 2, 13, (7, 19))
CALL = plain_call(61, 2, 11)


def measure_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the large product small, and times every call once."""
    monkeypatch.setattr(timing, "PRODUCT_SIZE", 67)
    monkeypatch.setattr(timing, "SHORTEST_SPAN", 0.0)


def write_unet(folder: Path) -> Path:
    """A folder in diffusers' layout with the config of a small UNet whose two levels both attend."""
    folder.mkdir(parents=True)
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "norm_num_groups": 8,
        "cross_attention_dim": 19,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def every_work(folder: Path) -> list[Work]:
    """A work of each kind."""
    return [SELF, CROSS, UnetWork(str(write_unet(folder / "unet")), 64, 1), CALL]


def measurement(series: str, size: int, peer: str, seconds: float, peak: int, unit: str = "px") -> Measurement:
    """A measurement with the figures that matter to a picture or a table."""
    return Measurement(
        series, size, unit, INFERENCE, peer, 1e-7, 3, seconds, seconds / 0.1, (0.97, 1.03), peak, 1000, 0.5, 2e11
    )


def made_up_results() -> Results:
    """Three peers on a layer at two sizes, two on bare calls of three sizes; one left out."""
    machine = {
        "date": "2026-01-01",
        "device": "cpu",
        "processor": "Some CPU",
        "cores": 3,
        "threads": 2,
        "cpu_capability": "AVX512",
        "half_precision": ["avx512_bf16", "amx_bf16"],
        "free_memory": 5,
        "system": "Linux",
        "versions": {"python": "3.11", "slicemod": "0.1", "torch": "2.14"},
    }
    rows = [
        measurement("layer", size, peer, seconds * size, peak * size)
        for size in (256, 512)
        for peer, seconds, peak in (("sdpa", 0.1, 9000), ("slicemod", 0.09, 7000), ("full", 0.3, 90_000))
    ]
    rows += [
        measurement("attention", size, peer, 1e-9 * size**2 * pace, 8000, "tokens")
        for size, pace in ((1024, 1.0), (2048, 1.1), (4096, 0.9))
        for peer in ("sdpa", "slicemod")
    ]
    return Results(["--quick"], machine, rows, [LeftOut("layer, 256 px", INFERENCE, "xformers", "is not installed")])
