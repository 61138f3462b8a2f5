"""Packed convolutions compute what plain ones do, and give their weights back in every bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from slicemod import pack_convolutions, restore_attention, swap_attention, swap_vae
from slicemod import packed_convolutions as module
from slicemod.bench.memory import peak_memory
from slicemod.half_precision import cpu_products
from slicemod.packed_convolutions import PackedConv2d
from slicemod.torch_internals import has_onednn, pack_convolution

pytestmark = pytest.mark.skipif(
    not has_onednn or cpu_products(torch.bfloat16) is None, reason="oneDNN does not multiply bfloat16 on this CPU"
)

SHAPES = [  # channels in and out, kernel, stride, padding, dilation
    (37, 53, 3, 1, 1, 1),
    (37, 53, 3, 2, 1, 1),
    (37, 53, 3, 2, 0, 1),
    (61, 3, 1, 1, 0, 1),
    (3, 61, (3, 1), (2, 1), (1, 0), (2, 1)),
    (131, 67, 5, 1, 2, 2),
]


def convolution(dtype: torch.dtype = torch.bfloat16, channels: int = 37, outputs: int = 53, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, **{"kernel_size": 3, "padding": 1, **more}).to(dtype).requires_grad_(False)


def unet(**more: Any) -> Any:
    return (
        UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=13,
            attention_head_dim=4,
            norm_num_groups=8,
            **more,
        )
        .to(torch.bfloat16)
        .requires_grad_(False)
    )


def image(*sizes: int) -> Tensor:
    return torch.randn(sizes).to(torch.bfloat16)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_as_exact_as_plain(shape: tuple[Any, ...], bias: bool, layout: torch.memory_format) -> None:
    channels, outputs, *sizes = shape
    names = ("kernel_size", "stride", "padding", "dilation")
    conv = convolution(channels=channels, outputs=outputs, bias=bias, **dict(zip(names, sizes, strict=True)))
    x = image(2, channels, 19, 23).to(memory_format=layout)
    wide = None if conv.bias is None else conv.bias.double()
    exact = F.conv2d(x.double(), conv.weight.double(), wide, conv.stride, conv.padding, conv.dilation)
    with torch.no_grad():
        plain = conv(x)
        with pack_convolutions(nn.Sequential(conv)):
            assert isinstance(conv, PackedConv2d)
            packed = conv(x)
    assert packed.dtype == x.dtype
    assert packed.shape == plain.shape
    allowed = 2 * float((plain.double() - exact).norm()) + torch.finfo(x.dtype).eps / 2 * float(exact.norm())
    assert float((packed.double() - exact).norm()) <= allowed


def test_undone_it_is_the_same_module_with_the_same_parameters_and_bits() -> None:
    model = unet().to(memory_format=torch.channels_last)
    before, parameters = bits(model), dict(model.named_parameters())
    kinds = [type(module) for module in model.modules()]
    strides = {name: parameter.stride() for name, parameter in parameters.items()}
    packed = pack_convolutions(model)
    assert len(packed.names) == sum(kind is nn.Conv2d for kind in kinds)
    packed.undo()
    packed.undo()  # there is nothing left to undo
    assert_same_bits(bits(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides


def test_a_unet_gives_what_it_gave() -> None:
    model = unet().eval()
    given = image(2, 4, 32, 24), 7, image(2, 11, 13)
    with torch.no_grad():
        wanted = model(*given).sample
        report = swap_attention(model, {"budget": "1MiB"}, feed_forward=True)
        with pack_convolutions(model):
            found = model(*given).sample
        assert report.check() == ()
        assert float((found - wanted).float().norm()) < 0.02 * float(wanted.float().norm())
        restore_attention(model)


def test_packed_weights_take_the_place_of_plain_ones() -> None:
    conv = convolution(channels=64, outputs=128)
    size = conv.weight.nbytes
    packed = pack_convolutions(nn.Sequential(conv))
    assert packed.weight_bytes == size
    assert str(packed) == "packed 1 convolutions, 0.1 MiB of weights"
    assert isinstance(conv, PackedConv2d)
    assert conv._plain.untyped_storage().nbytes() == 0


def test_a_call_of_a_small_image_takes_no_memory_for_weights() -> None:
    conv, x = convolution(channels=640, outputs=640), image(1, 640, 8, 8)
    with torch.no_grad():
        conv(x)
        plain = peak_memory(lambda: conv(x))
        with pack_convolutions(nn.Sequential(conv)):
            packed = peak_memory(lambda: conv(x))
    assert packed < plain / 10


def test_state_dicts_copies_and_pickles_hold_plain_weights() -> None:
    model = nn.Sequential(convolution(), nn.GroupNorm(1, 53)).requires_grad_()
    before = bits(model)
    pack_convolutions(model)
    assert_same_bits(bits(model), before)
    assert not any(tensor.requires_grad for tensor in model.state_dict().values())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other[0]) is nn.Conv2d
        assert_same_bits(bits(other), before)
    assert isinstance(model[0], PackedConv2d)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_makes_it_plain_with_what_was_loaded(assign: bool) -> None:
    model, other = nn.Sequential(convolution()), nn.Sequential(convolution())
    pack_convolutions(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert type(model[0]) is nn.Conv2d
    assert_same_bits(bits(model), bits(other))


def test_converting_a_model_makes_it_plain() -> None:
    model = nn.Sequential(convolution())
    wanted = bits(copy.deepcopy(model).double())
    packed = pack_convolutions(model)
    model.double()
    assert type(model[0]) is nn.Conv2d
    assert_same_bits(bits(model), wanted)
    packed.undo()
    assert_same_bits(bits(model), wanted)


def test_weights_that_are_written_to_are_an_error() -> None:
    conv = convolution()
    pack_convolutions(nn.Sequential(conv))
    with pytest.raises(RuntimeError, match="expects MKL-DNN tensor"):  # as adapters are merged
        conv.weight.data += torch.ones(53, 37, 3, 3, dtype=torch.bfloat16)


def test_a_call_that_needs_gradients_says_what_to_do() -> None:
    trained = convolution().requires_grad_()
    for conv, x in ((trained, image(1, 37, 7, 5)), (convolution(), image(1, 37, 7, 5).requires_grad_())):
        packed = pack_convolutions(nn.Sequential(conv))
        with pytest.raises(RuntimeError, match=r"got a call that needs gradients\. Call undo\(\)"):
            conv(x)
        packed.undo()
        conv(x).sum().backward()
    assert trained.weight.grad is not None


def test_what_is_not_a_plain_call_is_computed_by_plain_weights() -> None:
    conv, x = convolution(), image(1, 37, 13, 11)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = conv(x.float())
        with pack_convolutions(nn.Sequential(conv)):
            assert torch.equal(conv(x.float()), wanted)
    around = convolution(padding_mode="circular").requires_grad_(False)
    around.load_state_dict(conv.state_dict())
    with torch.no_grad(), pack_convolutions(nn.Sequential(conv)):
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = around._reversed_padding_repeated_twice
        torch.testing.assert_close(conv(x), around(x))


def test_a_graph_has_plain_convolutions_or_none() -> None:
    model, x = nn.Sequential(convolution()), image(1, 37, 13, 11)
    pack_convolutions(model)
    with torch.no_grad(), pytest.raises(Exception, match="packed convolutions: expected inference"):
        torch.compile(model, fullgraph=True, backend="eager")(x)


def test_what_cannot_be_packed_is_named_with_the_reason() -> None:
    twice = convolution(channels=5, outputs=5)
    other = convolution(channels=5, outputs=5)
    other.weight = twice.weight
    changed = convolution(channels=5, outputs=5)
    vars(changed)["forward"] = changed.forward  # as a program puts its own there
    view = convolution()
    view.weight = nn.Parameter(image(53, 37, 3, 5)[..., :3])
    model = nn.ModuleDict(
        {
            "plain": convolution(),
            "twice": twice,
            "other": other,
            "changed": changed,
            "groups": convolution(channels=6, outputs=6, groups=3),
            "reflect": convolution(padding_mode="reflect"),
            "same": convolution(padding="same"),
            "view": view,
            "float32": convolution(torch.float32),
        }
    )
    packed = pack_convolutions(model)
    assert packed.names == ("plain",)
    assert dict(packed.skipped) == {
        "twice": "another module has the same weight",
        "other": "another module has the same weight",
        "changed": "it is more than a convolution",
        "groups": "it has groups",
        "reflect": "its border is not a number of zeros",
        "same": "its border is not a number of zeros",
        "view": "its weight is a view of another tensor",
        "float32": "it computes in float32; packed weights are as exact and faster in bfloat16 alone",
    }
    with pytest.raises(ValueError, match="plain: it is packed"):
        pack_convolutions(nn.ModuleDict({"plain": model["plain"]}))
    with pytest.raises(ValueError, match=r"found none in Linear\. Pass a UNet"):
        pack_convolutions(nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module; got str"):
        pack_convolutions("unet")  # type: ignore[arg-type]


def test_a_parameter_packed_and_unpacked_in_inference_mode_can_be_trained() -> None:
    conv, x = convolution().requires_grad_(), image(1, 37, 7, 5)
    with torch.inference_mode(), pack_convolutions(nn.Sequential(conv)):
        conv(x)
    assert not conv.weight.is_inference()
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_whether_weights_are_trained_can_be_said_while_they_are_packed(wanted: bool) -> None:
    model, x = nn.Sequential(convolution(bias=False)).requires_grad_(not wanted), image(1, 37, 7, 5)
    packed = pack_convolutions(model)
    model.requires_grad_(wanted)
    if wanted:
        with pytest.raises(RuntimeError, match="needs gradients"):
            model(x)
    else:
        model(x)
    assert copy.deepcopy(model)[0].weight.requires_grad == wanted
    packed.undo()
    assert model[0].weight.requires_grad == wanted


def test_undoing_finds_convolutions_that_were_moved_and_is_not_stopped_by_others() -> None:
    model = nn.Sequential(convolution(), convolution(channels=53), convolution(channels=53))
    before = bits(model)
    packed = pack_convolutions(model)
    first, removed = model[0], model[1]
    model[0] = nn.Sequential(first)  # as an adapter wraps it
    del model[1]
    with torch.device("meta"):
        packed.undo()
    assert type(first) is type(removed) is type(model[1]) is nn.Conv2d
    model = nn.Sequential(first, removed, model[1])
    assert_same_bits(bits(model), before)


def test_a_copy_refers_to_itself_where_the_original_does() -> None:
    conv = convolution()
    pack_convolutions(nn.Sequential(conv))
    vars(conv)["owner"] = [conv]
    other = copy.deepcopy(conv)
    assert vars(other)["owner"][0] is other


def test_an_image_without_a_batch_is_taken() -> None:
    conv, x = convolution(), image(37, 13, 11)
    with torch.no_grad():
        wanted = conv(x)
        with pack_convolutions(nn.Sequential(conv)):
            assert torch.equal(conv(x), wanted)


def test_a_weight_that_another_module_has_stays_plain() -> None:
    conv, other = convolution(), nn.ConvTranspose2d(53, 37, 3)
    other.weight = conv.weight
    with pytest.raises(ValueError, match="0: another module has the same weight"):
        pack_convolutions(nn.Sequential(conv, other))


def test_if_packing_fails_nothing_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(convolution(), convolution(channels=53))
    before, calls = bits(model), []

    def fails_at_last(weight: Tensor, *sizes: Any) -> Tensor:
        calls.append(weight)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pack_convolution(weight, *sizes)  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "pack_convolution", fails_at_last)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pack_convolutions(model)
    assert [type(part) for part in model] == [nn.Conv2d] * 2
    assert_same_bits(bits(model), before)


def test_a_vae_has_strips_or_packed_convolutions() -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).to(torch.bfloat16)
    with swap_vae(vae, "1MiB"), pytest.raises(ValueError, match="a VAE that computes in strips"):
        pack_convolutions(vae)
    with pack_convolutions(vae), pytest.raises(ValueError, match="its convolutions are packed"):
        swap_vae(vae, "1MiB")
