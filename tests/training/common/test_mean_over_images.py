from __future__ import annotations

import pytest
import torch
from torch import nn

from slicemod.training.common.mean_over_images import MeanOverImages


@pytest.mark.parametrize("sizes", [[5], [3, 3], [3, 3, 2], [2, 7, 3, 1], [1, 5]], ids=str)
@pytest.mark.parametrize("accumulated", [4, 5])
def test_the_gradient_is_the_mean_over_all_images(sizes: list[int], accumulated: int) -> None:
    images = torch.randn(sum(sizes), 7, dtype=torch.float64)
    layer = nn.Linear(7, 3, dtype=torch.float64)
    unused = nn.Parameter(torch.ones(2))
    torch.autograd.backward(layer(images).square().sum(dim=1).mean())
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    mean = MeanOverImages()
    for _ in range(2):  # the second step starts from nothing
        layer.zero_grad()
        for batch in torch.split(images, sizes):
            loss = mean.weigh(layer(batch).square().sum(dim=1).mean(), len(batch))
            torch.autograd.backward(loss / accumulated)  # as Lightning does
        mean.settle([*layer.parameters(), unused], accumulated)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=0)


def test_whole_steps_of_equal_batches_keep_their_bits() -> None:
    mean, weight = MeanOverImages(), nn.Parameter(torch.ones(3))
    losses = [(weight * torch.randn(3)).sum() for _ in range(3)]
    assert [mean.weigh(loss, 5) for loss in losses] == losses
    weight.grad = torch.randn(3)
    before = weight.grad.clone()
    mean.settle([weight], 3)
    assert torch.equal(weight.grad, before)
