from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slicemod import SliceConfig
from slicemod.training.digits.latent_diffusion import LatentDiffusion, load_latent_diffusion
from slicemod.training.digits.sampling import Sampling, sample_images
from slicemod.user_error import UserError

QUICK = Sampling(steps=5, refined_share=0.4)
LABELS = torch.tensor([0, 4, 9])


@pytest.fixture(scope="module")
def model(base_checkpoint: Path) -> LatentDiffusion:
    return load_latent_diffusion(base_checkpoint, attention=None)


def draw(model: LatentDiffusion, sampling: Sampling = QUICK, resolution: int | None = None) -> torch.Tensor:
    return sample_images(model, LABELS, sampling, resolution=resolution, progress=False)


@pytest.mark.parametrize("resolution", [None, 32, 40, 64, 128])
def test_images_have_the_asked_resolution(model: LatentDiffusion, resolution: int | None) -> None:
    images = draw(model, resolution=resolution)
    edge = resolution or 32
    assert images.shape == (3, 1, edge, edge)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


def test_the_seed_decides_and_the_batch_size_does_not(model: LatentDiffusion) -> None:
    images = draw(model)
    assert torch.equal(images, draw(model))
    torch.testing.assert_close(images, draw(model, Sampling(steps=5, batch_size=2)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(images, draw(model, Sampling(steps=5, seed=1)), atol=1e-2)


def test_sliced_attention_draws_the_same_images(model: LatentDiffusion, base_checkpoint: Path) -> None:
    sliced = load_latent_diffusion(base_checkpoint, attention=SliceConfig(budget="1MiB", policy="exact"))
    torch.testing.assert_close(draw(sliced), draw(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_sampling_draws_the_same_images(model: LatentDiffusion, base_checkpoint: Path) -> None:
    torch.compiler.reset()
    slicing = SliceConfig(budget="1MiB", policy="exact")
    compiled = load_latent_diffusion(base_checkpoint, attention=slicing, compile=True)
    torch.testing.assert_close(draw(compiled), draw(model), rtol=1e-4, atol=1e-4)


def test_without_guidance_the_null_class_does_not_matter(base_checkpoint: Path) -> None:
    model = load_latent_diffusion(base_checkpoint, attention=None)
    images = [draw(model, Sampling(steps=3, guidance=guidance)) for guidance in (1.0, 3.0)]
    with torch.no_grad():
        model.class_embedder.embedding.weight[-1] += 5
    assert torch.equal(images[0], draw(model, Sampling(steps=3, guidance=1.0)))
    assert not torch.equal(images[1], draw(model, Sampling(steps=3, guidance=3.0)))


@pytest.mark.parametrize(
    ("labels", "resolution", "steps", "named"),
    [
        ([10], None, 5, "from 0 to 9, got 10"),
        ([-1, 3], None, 5, "got -1"),
        ([], None, 5, "got none"),
        ([3], 36, 5, "multiple of 8"),
        ([3], 16, 5, "at least 32 pixels"),
        ([3], None, 0, "from 1 to 1000, got 0"),
        ([3], None, 1001, "got 1001"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    model: LatentDiffusion, labels: list[int], resolution: int | None, steps: int, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        sample_images(model, torch.tensor(labels, dtype=torch.int64), Sampling(steps=steps), resolution=resolution)
