"""Group norm over strips has the statistics of the whole image, as accurate as PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.vae.group_norm import apply_group_norm, channel_moments
from slicemod.vae.strips import Strips


def in_strips(image: Tensor, rows: list[int]) -> Strips:
    strips = Strips()
    for strip in torch.split(image, rows, dim=2):
        strips.append(strip.clone())
    return strips


def error(image: Tensor, groups: int, ours: Tensor) -> float:
    return float((ours.double() - F.group_norm(image.double(), groups)).abs().max())


@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["centred", "far from zero"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_it_is_as_accurate_as_the_whole(offset: float, layout: torch.memory_format) -> None:
    image = torch.randn(1, 21, 31, 13) * torch.linspace(0.1, 3, 31)[:, None] + offset
    strips = in_strips(image.to(memory_format=layout), [7, 1, 23])
    norm = nn.GroupNorm(7, 21, eps=1e-6, affine=False)
    ours = apply_group_norm(norm, image, channel_moments(strips, 7, 11))
    assert error(image, 7, ours) <= 2 * error(image, 7, norm(image)) + 1e-6


def test_a_group_without_variance_gives_its_bias() -> None:
    image = torch.full((1, 6, 11, 5), 3.0)
    norm = nn.GroupNorm(2, 6)
    nn.init.constant_(norm.bias, 0.7)
    with torch.no_grad():
        ours = apply_group_norm(norm, image, channel_moments(in_strips(image, [4, 7]), 2, 11))
    torch.testing.assert_close(ours, torch.full_like(image, 0.7), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    image = (torch.randn(1, 6, 211, 101) + 5).to(dtype)
    norm = nn.GroupNorm(2, 6).to(dtype)
    mean, variance = channel_moments(in_strips(image, [103, 108]), 2, 67)
    assert mean.dtype == variance.dtype == torch.float32
    exact = image.double().view(2, -1)
    torch.testing.assert_close(mean[::3].double(), exact.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance[::3].double(), exact.var(1, correction=0), rtol=1e-5, atol=0)
    with torch.no_grad():
        ours = apply_group_norm(norm, image, (mean, variance))
        torch.testing.assert_close(ours, norm(image), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
