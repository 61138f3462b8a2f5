"""Hosts on a CUDA device: the same images, within the budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from slicemod.bench.memory import peak_memory
from slicemod.config import SliceConfig
from slicemod.swap import restore_attention, swap_attention

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are made there, and convolutions are exact enough to compare what follows from them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device("cuda"):
        yield


def unet() -> Any:
    """A small UNet with attention at every level."""
    model: Any = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("slicing", [SliceConfig(), SliceConfig(budget="2MiB", policy="exact", kernel="math")], ids=str)
def test_a_swapped_unet_draws_the_same(slicing: SliceConfig, dtype: torch.dtype) -> None:
    model = unet().to(dtype)
    given = torch.randn(2, 4, 32, 32, dtype=dtype), 500, torch.randn(2, 77, 32, dtype=dtype)
    with torch.no_grad():
        wanted = model(*given).sample
        swap_attention(model, slicing)
        found = model(*given).sample
        restore_attention(model)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_a_swapped_unet_trains() -> None:
    model = unet()
    swap_attention(model, SliceConfig(budget="2MiB", policy="exact", kernel="math"))
    model.requires_grad_(True)
    sample: torch.Tensor = model(torch.randn(2, 4, 32, 32), 500, torch.randn(2, 77, 32)).sample
    torch.autograd.backward(sample.square().mean())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_budget_of_two_mebibytes_adds_no_more_to_a_unets_peak() -> None:
    model = unet()
    given = torch.randn(2, 4, 64, 64), 500, torch.randn(2, 77, 32)

    def infer() -> object:
        with torch.no_grad():
            return model(*given).sample

    class Skips:
        """Processors that leave attention out: what the rest of the UNet takes."""

        def __call__(self, attention: Any, hidden_states: Any, *_: object, **__: object) -> Any:
            return hidden_states

    infer()
    before = dict(model.attn_processors)
    model.set_attn_processor(Skips())
    rest = peak_memory(infer, "cuda")
    model.set_attn_processor(before)
    swap_attention(model, SliceConfig(budget="2MiB", policy="exact", kernel="math"))
    infer()
    inputs_and_output = 4 * 2 * 4096 * 32 * 4  # query, key, value and output of the largest layer
    assert peak_memory(infer, "cuda") <= rest + 2 * 2**20 + inputs_and_output


def test_a_compiled_unet_agrees() -> None:
    model = unet()
    swap_attention(model, SliceConfig(budget="2MiB", policy="exact", kernel="math"))
    given = torch.randn(1, 4, 32, 32), torch.tensor(500), torch.randn(1, 77, 32)
    with torch.no_grad():
        wanted = model(*given).sample
        compiled: Any = torch.compile(model, fullgraph=True)
        found = compiled(*given).sample
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
