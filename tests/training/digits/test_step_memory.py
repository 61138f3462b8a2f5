from __future__ import annotations

from pathlib import Path

import pytest

from slicemod import SliceConfig
from slicemod.training.digits.latent_diffusion import load_latent_diffusion
from slicemod.training.digits.step_memory import measure_training_steps


@pytest.mark.slow
def test_a_sliced_training_step_takes_less_than_one_with_materialised_scores(base_checkpoint: Path) -> None:
    model = load_latent_diffusion(base_checkpoint, attention=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = dict(model.unet.attn_processors)
    slicing = SliceConfig(budget="1MiB", policy="exact")
    measured = measure_training_steps(model, slicing, resolution=192, batch=1)
    plain, _, auto, math = (step.peak_bytes for step in measured)
    assert auto < plain / 2
    assert math < plain / 2
    assert [len(step.plans) for step in measured] == [0, 0, 8, 8]
    assert {plan.kernel for plan in measured[3].plans.values()} == {"math"}
    assert max(plan.steps for plan in measured[3].plans.values()) > 1
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert {type(kind) for kind in model.unet.attn_processors.values()} == {type(kind) for kind in own.values()}
    assert all(parameter.grad is None for parameter in model.parameters())
