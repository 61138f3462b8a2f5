from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from slicemod import SliceConfig
from slicemod.training.common.checkpoints import CheckpointError, read_checkpoint
from slicemod.training.digits.class_embedder import ClassEmbedder
from slicemod.training.digits.digit_images import DigitsDataModule
from slicemod.training.digits.latent_diffusion import (
    COMPONENTS,
    LatentDiffusion,
    checkpoint_attention,
    load_latent_diffusion,
)
from slicemod.user_error import UserError

SLICED = SliceConfig(budget="1MiB", policy="exact")


def small_model(
    *,
    attention: SliceConfig | None = None,
    compile: bool = False,  # noqa: A002
    prediction_type: str = "epsilon",
    context_dim: int = 12,
    levels: int = 2,
    latent_channels: int = 3,
) -> LatentDiffusion:
    torch.manual_seed(0)
    return LatentDiffusion(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-levels:],
            mid_block_type="UNetMidBlock2DCrossAttn" if levels == 2 else None,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:levels],
            block_out_channels=(8, 16)[-levels:],
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=2,
        ),
        AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 4, 4),
            latent_channels=latent_channels,
            norm_num_groups=2,
            mid_block_add_attention=False,
        ),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False),
        ClassEmbedder(dim=context_dim),
        attention=attention,
        compile=compile,
    )


def losses(model: LatentDiffusion, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD([*model.unet.parameters(), *model.class_embedder.parameters()], lr=1e-2)
    latents = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(5)
    found = []
    for step in range(steps):
        loss = model.diffusion_loss(latents, labels, noise_seed=step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(loss.item())
    return found


def test_swapped_attention_gives_the_same_losses() -> None:
    assert losses(small_model(attention=SLICED)) == pytest.approx(losses(small_model()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
def test_compiled_training_gives_the_same_losses() -> None:
    torch.compiler.reset()
    compiled = small_model(attention=SLICED, compile=True, levels=1)
    assert list(compiled.state_dict()) == list(small_model(levels=1).state_dict())
    assert losses(compiled) == pytest.approx(losses(small_model(attention=SLICED, levels=1)), rel=1e-5)


def test_swapped_unet_loads_the_base_checkpoint_with_no_key_changed(base_checkpoint: Path) -> None:
    base = load_latent_diffusion(base_checkpoint, attention=None)
    swapped = load_latent_diffusion(base_checkpoint, attention=SLICED)
    assert swapped.swap_report is not None
    assert len(swapped.swap_report.layers) == 8
    assert list(swapped.state_dict()) == list(base.state_dict()) == list(read_checkpoint(base_checkpoint)["state_dict"])
    batch = next(iter(DigitsDataModule(batch_size=6).val_dataloader()))
    first, second = (model.diffusion_loss(model.encode(batch["image"]), batch["label"], 7) for model in (base, swapped))
    assert first.item() == pytest.approx(second.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_clean_latents_come_back_from_a_perfect_prediction(kind: str) -> None:
    model = small_model(prediction_type=kind)
    latents, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    timesteps = torch.full((5,), 250)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    target = model._target(latents, noise, timesteps)
    model.unet.forward = lambda *_: type("Output", (), {"sample": target})
    torch.testing.assert_close(model._denoised_once(latents, labels, noise_seed=3), latents, rtol=1e-4, atol=1e-5)


def test_velocity_is_the_schedulers() -> None:
    model = small_model(prediction_type="v_prediction")
    latents, noise, timesteps = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 250, 600, 999])
    torch.testing.assert_close(
        model._target(latents, noise, timesteps), model.scheduler.get_velocity(latents, noise, timesteps)
    )


def test_the_null_class_is_what_dropped_labels_become() -> None:
    embedder = ClassEmbedder(num_classes=10, dim=12)
    labels = torch.tensor([3, 7])
    dropped = embedder(labels, torch.tensor([True, False]))
    assert dropped.shape == (2, 1, 12)
    assert torch.equal(dropped[0], embedder(torch.tensor([embedder.null_class]))[0])
    assert torch.equal(dropped[1], embedder(labels)[1])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"context_dim": 13}, "cross_attention_dim"),
        ({"latent_channels": 5}, "latent_channels"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        small_model(**wrong)  # type: ignore[arg-type]


def test_a_checkpoint_remembers_its_attention(base_checkpoint: Path, tmp_path: Path) -> None:
    assert checkpoint_attention(base_checkpoint) is None
    content = read_checkpoint(base_checkpoint)
    content[COMPONENTS]["attention"] = {"budget": "3MiB", "policy": "exact"}
    torch.save(content, tmp_path / "swapped.ckpt")
    assert checkpoint_attention(tmp_path / "swapped.ckpt") == SliceConfig(budget="3MiB", policy="exact")


def test_a_checkpoint_of_another_shape_or_another_program_is_refused(base_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not fit this LatentDiffusion"):
        small_model().load_weights(base_checkpoint)
    content = read_checkpoint(base_checkpoint)
    content[COMPONENTS]["scheduler"]["_class_name"] = "AutoencoderKL"
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt describes no model"):
        load_latent_diffusion(tmp_path / "odd.ckpt", attention=None)
    del content[COMPONENTS]
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt is no checkpoint of `slicemod fit`"):
        load_latent_diffusion(tmp_path / "foreign.ckpt", attention=None)
