"""Decoding and encoding in strips, by diffusers' and LDM's own AutoencoderKL: the same picture in less memory."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor, nn

from slicemod.bench.memory import peak_memory
from slicemod.plan import NotEnoughMemoryError
from slicemod.swap import restore_attention, swap_attention, swap_vae
from slicemod.vae.half import StripwiseHalf
from slicemod.vae.plan import StripPlan

SMALL = "200KiB"


class LDMVae(nn.Module):
    """The two halves of LDM's AutoencoderKL, whose own module needs PyTorch Lightning 1."""

    def __init__(self, channels: int = 4, **more: Any) -> None:
        super().__init__()
        sizes = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (), **more}
        self.encoder = Encoder(in_channels=3, resolution=64, z_channels=channels, **sizes)
        self.decoder = Decoder(in_channels=3, resolution=64, z_channels=channels, **sizes)


def diffusers_vae(channels: int = 4, **more: Any) -> Any:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        **more,
    )


MAKES: dict[str, Any] = {"diffusers": diffusers_vae, "LDM": LDMVae}
every_host = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """LDM prints what it builds."""


def decoded(vae: Any, latents: Tensor) -> Tensor:
    output: Tensor = vae.decoder(latents)
    return output


def encoded(vae: Any, images: Tensor) -> Tensor:
    output: Tensor = vae.encoder(images)
    return output


def error(output: Tensor, exact: Tensor) -> float:
    return float((output.double() - exact).norm() / exact.norm())


def assert_same_picture(vae: Any, call: Any, given: Tensor) -> StripPlan:
    """As near as the VAE's own result to the exact one, which a copy in float64 computes."""
    with torch.no_grad():
        exact = call(copy.deepcopy(vae).double(), given.double())
        theirs = call(vae, given)
        with swap_vae(vae, SMALL):
            ours = call(vae, given)
            plan: StripPlan = (vae.decoder if call is decoded else vae.encoder).plan
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert error(ours, exact) <= 2 * error(theirs, exact)
    return plan


@every_host
@pytest.mark.parametrize("sizes", [(1, 13, 11), (3, 7, 17), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("channels", [4, 16])
@torch.no_grad()
def test_a_decoded_picture_is_the_vaes_own(make: Any, sizes: tuple[int, int, int], channels: int) -> None:
    items, height, width = sizes
    plan = assert_same_picture(make(channels), decoded, torch.randn(items, channels, height, width))
    assert min(plan.rows) < 4 * height - 1


@every_host
@pytest.mark.parametrize("sizes", [(1, 53, 47), (3, 31, 67), (2, 29, 90)], ids=str)
def test_an_encoded_picture_is_the_vaes_own(make: Any, sizes: tuple[int, int, int]) -> None:
    items, height, width = sizes
    plan = assert_same_picture(make(), encoded, torch.randn(items, 3, height, width))
    assert min(plan.rows) < height


@every_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact(make: Any, dtype: torch.dtype) -> None:
    vae = make().to(dtype)
    assert_same_picture(vae, decoded, torch.randn(1, 4, 13, 11, dtype=dtype))
    assert_same_picture(vae, encoded, torch.randn(1, 3, 53, 47, dtype=dtype))


@every_host
def test_channels_last_stays_so(make: Any) -> None:
    vae = make().to(memory_format=torch.channels_last)
    for items in (1, 2):
        latents = torch.randn(items, 4, 13, 11).contiguous(memory_format=torch.channels_last)
        assert_same_picture(vae, decoded, latents)
        with torch.no_grad(), swap_vae(vae, SMALL):
            assert decoded(vae, latents).is_contiguous(memory_format=torch.channels_last)


@every_host
def test_the_height_of_the_strips_makes_no_difference(make: Any) -> None:
    vae, latents = make(), torch.randn(1, 4, 13, 11)
    with torch.no_grad():
        expected = decoded(vae, latents)
        for budget in ("100KiB", "170KiB", "500KiB", "auto"):
            swap_vae(vae, budget)
            torch.testing.assert_close(decoded(vae, latents), expected, rtol=1e-4, atol=1e-5)


@every_host
def test_both_halves_and_the_attention_are_swapped_and_come_back(make: Any) -> None:
    vae = make()
    before, keys = list(vae.named_modules()), list(vae.state_dict())
    report = swap_vae(vae, SMALL)
    assert [(layer.name, layer.role) for layer in report.layers[:2]] == [
        ("encoder", "VAE half"),
        ("decoder", "VAE half"),
    ]
    assert [layer.role for layer in report.layers[2:]] == ["attention"] * 2
    assert "swapped 2 attention layers and 2 VAE halves" in str(report)
    assert list(vae.state_dict()) == keys
    assert restore_attention(vae) == 4
    assert list(vae.named_modules()) == before
    with swap_vae(vae, SMALL):
        assert isinstance(vae.decoder, StripwiseHalf)
    assert list(vae.named_modules()) == before


def test_attention_alone_leaves_the_halves_alone() -> None:
    vae = diffusers_vae()
    swap_attention(vae)
    assert not isinstance(vae.decoder, StripwiseHalf)


@every_host
def test_training_runs_the_original_code(make: Any) -> None:
    vae, latents = make(), torch.randn(1, 4, 5, 7)
    parameters = list(vae.decoder.parameters())
    expected = torch.autograd.grad(decoded(vae, latents).square().sum(), parameters)
    swap_vae(vae, SMALL)
    ours = torch.autograd.grad(decoded(vae, latents).square().sum(), parameters)
    assert vae.decoder.plan is None
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_may_be_turned_on_after_the_swap() -> None:
    vae, latents = diffusers_vae().train(), torch.randn(1, 4, 5, 7)
    swap_vae(vae, SMALL)
    vae.enable_gradient_checkpointing()
    assert vae.decoder.gradient_checkpointing
    torch.autograd.grad(decoded(vae, latents).sum(), list(vae.decoder.parameters()))
    restore_attention(vae)
    assert vae.decoder.gradient_checkpointing


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_restored_on_its_own(duplicate: Any) -> None:
    vae, latents = diffusers_vae(), torch.randn(1, 4, 5, 7)
    swap_vae(vae, SMALL)
    with torch.no_grad():
        expected = decoded(vae, latents)
        other = duplicate(vae)
        torch.testing.assert_close(decoded(other, latents), expected)
    assert restore_attention(other) == 4
    assert isinstance(vae.decoder, StripwiseHalf)


def test_hooks_of_convolutions_run_and_lora_counts() -> None:
    peft = pytest.importorskip("peft")
    vae, latents = diffusers_vae(), torch.randn(1, 4, 13, 11)
    config = peft.LoraConfig(r=3, target_modules=["conv1", "conv2", "conv_out"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, vae)
    seen: list[int] = []
    vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2]))
    assert_same_picture(vae, decoded, latents)
    assert len(seen) >= 3


def test_hooks_of_other_parts_are_refused_by_name() -> None:
    vae = diffusers_vae()
    vae.decoder.mid_block.resnets[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="decoder: its ResnetBlock2D has hooks"):
        report = swap_vae(vae, SMALL)
    assert [name for name, _ in report.skipped] == ["decoder"]
    restore_attention(vae)
    later = diffusers_vae()
    swap_vae(later, SMALL)
    later.decoder.mid_block.resnets[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with torch.no_grad(), pytest.raises(ValueError, match="its ResnetBlock2D has hooks"):
        decoded(later, torch.randn(1, 4, 5, 7))


def test_changed_code_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = diffusers_vae()
    monkeypatch.setattr(type(vae.decoder.mid_block.resnets[0]), "forward", lambda self, x, temb=None: x)
    with pytest.raises(ValueError, match="of its ResnetBlock2D, forward of its class ResnetBlock2D was replaced"):
        swap_vae(vae, SMALL)


def test_attention_that_cannot_be_swapped_is_named_and_the_halves_are_swapped() -> None:
    vae = diffusers_vae()
    for half in (vae.encoder, vae.decoder):
        half.mid_block.attentions[0].set_processor(type("Other", (), {"__call__": lambda self, attn, x, **more: x})())
    with pytest.warns(UserWarning, match="swapped in part: no layers were, 2 were left as they are"):
        report = swap_vae(vae, SMALL)
    assert [layer.role for layer in report.layers] == ["VAE half"] * 2
    assert len(report.skipped) == 2


def test_a_vae_without_attention_is_swapped() -> None:
    vae = diffusers_vae(mid_block_add_attention=False)
    assert_same_picture(vae, decoded, torch.randn(1, 4, 13, 11))


def test_what_is_no_vae_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected VAE halves of VAE; found none in Linear"):
        swap_vae(nn.Linear(3, 5), SMALL)


def test_a_budget_below_a_row_is_an_error_that_says_what_is_needed() -> None:
    vae = diffusers_vae()
    swap_vae(vae, 1000)
    with torch.no_grad(), pytest.raises(NotEnoughMemoryError, match=r"VAE: needs .* for a strip of one row and has"):
        decoded(vae, torch.randn(1, 4, 5, 7))


def test_a_tiled_vae_decodes_its_tiles() -> None:
    vae, latents = diffusers_vae(sample_size=32), torch.randn(1, 4, 13, 19)
    vae.enable_tiling()
    with torch.no_grad():
        expected = vae.decode(latents).sample
        swap_vae(vae, SMALL)
        torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_host
@torch.no_grad()
def test_a_compiled_vae_is_one_graph_of_any_size_and_gives_the_same(make: Any) -> None:
    torch._dynamo.reset()
    vae = make()
    swap_vae(vae, "100KiB")
    compiled: Any = torch.compile(vae.decoder, backend="aot_eager", fullgraph=True)
    for sizes in ((1, 4, 5, 7), (2, 4, 7, 11)):
        latents = torch.randn(sizes)
        torch.testing.assert_close(compiled(latents), decoded(vae, latents), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_vae_with_other_layers_gives_the_same() -> None:
    """A hook, which the operator would miss: the layers are traced strip by strip."""
    torch._dynamo.reset()
    vae, latents = diffusers_vae(), torch.randn(1, 4, 5, 7)
    vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: 2 * output)
    swap_vae(vae, "100KiB")
    compiled: Any = torch.compile(vae.decoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(latents), decoded(vae, latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooked", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "hooked"])
@torch.no_grad()
def test_a_compiled_vae_without_room_raises_the_same_error(hooked: bool) -> None:
    """With a hook, which the operator would miss, the layers are traced one by one."""
    torch._dynamo.reset()
    vae = diffusers_vae()
    if hooked:
        vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: 2 * output)
    swap_vae(vae, 1000)
    compiled: Any = torch.compile(vae.decoder, backend="aot_eager", fullgraph=True)
    with pytest.raises(NotEnoughMemoryError, match=r"VAE: needs .* for a strip of one row and has"):
        compiled(torch.randn(1, 4, 5, 7))


@pytest.mark.slow
@pytest.mark.parametrize("call", [decoded, pytest.param(encoded, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_vae_takes_what_is_planned(call: Any, backend: str) -> None:
    """Beside it, only the small image before or after the attention."""
    torch._dynamo.reset()
    vae = diffusers_vae()
    given = torch.randn(1, 4, 64, 67) if call is decoded else torch.randn(1, 3, 256, 268)
    swap_vae(vae, "2MiB")
    half = vae.decoder if call is decoded else vae.encoder
    half(given)
    planned = half.plan.peak_bytes
    compiled: Any = torch.compile(half, backend=backend, fullgraph=True)
    compiled(given)
    peak = peak_memory(lambda: compiled(given))
    print(f"{call.__name__} {backend}: planned {planned:,}, compiled {peak:,}")
    assert 0.9 * planned <= peak <= planned + 4 * 64 * 64 * 67


@pytest.mark.parametrize(
    ("call", "before", "after"),
    [(decoded, 7.2, 4.2), pytest.param(encoded, 4.8, 3.2, marks=pytest.mark.slow)],
    ids=["decoder", "encoder"],
)
@torch.no_grad()
def test_the_peak_in_activations_of_full_size(call: Any, before: float, after: float) -> None:
    """Stable Diffusion's VAE with a quarter of its channels: an activation is one of 32 channels at full size."""
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    given = torch.randn(1, 4, 32, 32) if call is decoded else torch.randn(1, 3, 256, 256)
    activation = 4 * 32 * 256 * 256
    swap_attention(vae, {"budget": "1MiB"})
    call(vae, given)
    assert peak_memory(lambda: call(vae, given)) >= before * activation
    swap_vae(vae, "4MiB")
    call(vae, given)
    plan = (vae.decoder if call is decoded else vae.encoder).plan
    peak = peak_memory(lambda: call(vae, given))
    assert peak <= after * activation
    assert 0.9 * plan.peak_bytes <= peak <= plan.peak_bytes


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("pixels", [256, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, pytest.param(torch.channels_last, marks=pytest.mark.slow)], ids=str
)
@torch.no_grad()
def test_a_plan_is_what_is_taken_at_most(dtype: torch.dtype, pixels: int, layout: torch.memory_format) -> None:
    vae = diffusers_vae().to(dtype).to(memory_format=layout)
    swap_vae(vae, "2MiB")
    for call, given in ((decoded, torch.randn(1, 4, pixels // 4, 67)), (encoded, torch.randn(1, 3, pixels, 268))):
        given = given.to(dtype).contiguous(memory_format=layout)
        call(vae, given)
        planned = (vae.decoder if call is decoded else vae.encoder).plan.peak_bytes
        peak = peak_memory(partial(call, vae, given))
        print(f"{call.__name__} {dtype}: planned {planned:,}, measured {peak:,}")
        assert 0.85 * planned <= peak <= planned
