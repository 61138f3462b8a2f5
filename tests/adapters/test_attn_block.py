"""The attention of LDM's VAE, with the original code, swapped and restored."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from ldm.modules.attention import SpatialSelfAttention
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, MemoryEfficientAttnBlock
from torch import Tensor, nn

from slicemod.adapters.attn_block import MemoryAwareAttnBlock
from slicemod.bench.memory import peak_memory
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

SLICINGS: dict[str, dict[str, Any]] = {
    "auto": {"budget": "1GiB"},
    "rows": {"kernel": "math", "steps": 7},
    "exact": {"kernel": "math", "budget": "64KiB", "policy": "exact"},
}
every_slicing = pytest.mark.parametrize("slicing", SLICINGS.values(), ids=SLICINGS.keys())
VAE: dict[str, Any] = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (10,),
    "in_channels": 3,
    "resolution": 10,
    "z_channels": 5,
}


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    output = model(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


@every_slicing
@pytest.mark.parametrize("kind", [AttnBlock, SpatialSelfAttention], ids=lambda kind: kind.__name__)
def test_a_swapped_block_computes_the_same(kind: Any, slicing: dict[str, Any]) -> None:
    model = with_random_weights(nn.Sequential(kind(32)))
    x = torch.randn(2, 32, 7, 11)
    expected = results(model, x)
    report = swap_attention(model, slicing)
    assert [(layer.name, layer.host) for layer in report.layers] == [("0", "CompVis VAE")]
    assert_same(results(model, x), expected)
    assert report.layers[0].plan is not None


@every_slicing
@pytest.mark.parametrize(("half", "channels", "blocks"), [(Encoder, 3, 2), (Decoder, 5, 3)], ids=["encoder", "decoder"])
def test_both_halves_of_a_vae_compute_the_same_and_come_back(
    half: Any, channels: int, blocks: int, slicing: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_random_weights(half(**VAE))
    capsys.readouterr()  # LDM prints what it builds
    x = torch.randn(2, channels, 10, 10)
    expected, before, keys = results(model, x), list(model.named_modules()), list(model.state_dict())
    with swap_attention(model, slicing) as report:
        assert len(report.layers) == blocks
        assert list(model.state_dict()) == keys
        assert_same(results(model, x), expected)
    assert list(model.named_modules()) == before
    assert all(map(torch.equal, results(model, x), expected))


def test_xformers_blocks_are_swapped_and_need_no_xformers_then() -> None:
    plain, x = with_random_weights(AttnBlock(32)), torch.randn(2, 32, 7, 11)
    model = nn.Sequential(MemoryEfficientAttnBlock(32))
    model[0].load_state_dict(plain.state_dict())
    swap_attention(model, SLICINGS["rows"])
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_layout_of_channels_last_gives_the_same() -> None:
    model, x = with_random_weights(nn.Sequential(AttnBlock(32))), torch.randn(2, 32, 7, 11)
    expected = model(x)
    swap_attention(model, SLICINGS["rows"])
    output = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert model(x).stride() == expected.stride()


def test_keyword_arguments_that_sgms_decoders_pass_are_taken() -> None:
    block, x = MemoryAwareAttnBlock(32), torch.randn(2, 32, 7, 11)
    assert torch.equal(block(x, timesteps=3), block(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_swapped_block_is_restored_on_its_own(duplicate: Any) -> None:
    model, x = with_random_weights(nn.Sequential(AttnBlock(32))), torch.randn(2, 32, 7, 11)
    expected = model(x)
    swap_attention(model, SLICINGS["rows"])
    other = duplicate(model)
    assert restore_attention(other) == 1
    assert type(other[0]) is AttnBlock
    assert torch.equal(other(x), expected)
    assert isinstance(model[0], MemoryAwareAttnBlock)


def test_the_block_stays_within_its_budget_and_the_images_own_size() -> None:
    """Full attention keeps two matrices of 48 MiB; the block itself six images of 0.4 MiB."""
    model, x = nn.Sequential(AttnBlock(32)), torch.randn(1, 32, 59, 61)
    with torch.no_grad():
        full = peak_memory(lambda: model(x))
        swap_attention(model, {"kernel": "math", "budget": "2MiB", "policy": "exact"})
        peak = peak_memory(lambda: model(x))
    image = x.numel() * x.element_size()
    assert full > 2 * (59 * 61) ** 2 * 4
    assert peak <= 2 * 2**20 + 6 * image


def test_repr_shows_settings_and_once_called_the_plan() -> None:
    block = MemoryAwareAttnBlock(32, SLICINGS["rows"])
    assert "in_channels=32, budget='auto', policy='exact', kernel='math', steps=7" in repr(block)
    block(torch.randn(1, 32, 7, 11))
    assert "plan: math, 7 x 11 rows," in repr(block)


def test_a_block_that_holds_more_is_left_alone() -> None:
    block = AttnBlock(32)
    block.gate = nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match="0: it holds gate besides"):
        report = swap_attention(nn.Sequential(block, AttnBlock(32)))
    assert report.skipped == (("0", "it holds gate besides norm, q, k, v, proj_out"),)


class VideoBlock(nn.Module):
    """What ComfyUI's block does to a video: every pixel of every frame attends to all."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.norm = 32, nn.GroupNorm(32, 32)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(32, 32, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (part(normed).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        projected: Tensor = x + self.proj_out(output[:, 0].mT.reshape(x.shape))
        return projected


VideoBlock.__name__ = "AttnBlock"


@every_slicing
def test_a_block_of_a_video_computes_the_same(slicing: dict[str, Any]) -> None:
    model = with_random_weights(nn.Sequential(VideoBlock()))
    x = torch.randn(2, 32, 3, 5, 7)
    expected = results(model, x)
    with swap_attention(model, slicing, filter_fn=lambda name, module: True):
        assert_same(results(model, x), expected)


def test_a_block_whose_code_is_not_known_is_swapped_only_where_it_is_chosen() -> None:
    model = nn.Sequential(VideoBlock())
    with pytest.raises(ValueError, match="VideoBlock has a forward that slicemod does not know; choose it with filter"):
        swap_attention(model)
    assert type(model[0]) is VideoBlock
