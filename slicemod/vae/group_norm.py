"""Group norm of an image in strips: statistics of the whole image, applied to some rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicemod.vae.strips import Strips, bounds


def channel_moments(image: Strips, groups: int, tallest: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over the whole image that group norm applies to each channel; float32 `(C,)` each.

    It looks at no more than `tallest` rows at a time. Each such part is summed about its own mean, and the sums are
    combined as in Chan, Golub and LeVeque, 1979: the difference of two large sums would lose the digits of a small
    variance.
    """
    strips = [strip[:, :, top:end] for strip in image.strips for top, end in bounds(strip.shape[2], tallest)]
    pixels = [strip.shape[2] * strip.shape[3] for strip in strips]
    shares = torch.tensor(pixels, dtype=torch.float32, device=strips[0].device)[:, None] / sum(pixels)  # (S, 1)
    found = [_moments(strip, groups) for strip in strips]
    means, variances = torch.stack([mean for mean, _ in found]), torch.stack([variance for _, variance in found])
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    width = strips[0].shape[1] // groups
    return mean.repeat_interleave(width), variance.repeat_interleave(width)


def _moments(strip: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels in a strip; float32 `(G,)` each.

    By PyTorch's group norm, which is many times faster than its `var_mean` on a CPU, and as accurate if each channel
    lies in one piece. The weight of ones makes it return float32 in half precision too.
    """
    strip = strip.contiguous()
    _, channels, height, width = strip.shape
    ones = torch.ones(channels, dtype=torch.float32, device=strip.device)
    _, mean, rstd = torch.native_group_norm(strip, ones, ones, 1, channels, height * width, groups, 0.0)
    return mean[0], rstd[0].float().pow(-2)


def apply_group_norm(norm: nn.GroupNorm, rows: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    """Some rows of an image, normalised by the moments of the whole image. A tensor of its own."""
    weight, bias = (None if given is None else given.float() for given in (norm.weight, norm.bias))
    return F.batch_norm(rows, *moments, weight, bias, training=False, eps=norm.eps)
