"""`prepare_for_cpu` chooses a way for each module, says so, and can be undone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from slicemod import prepare_for_cpu, restore_attention, swap_attention, swap_vae
from slicemod.half_precision import cpu_products
from slicemod.on_cpu import prepare
from slicemod.on_cpu.packed import PackedConv2d
from slicemod.on_cpu.prepared import Prepared
from slicemod.on_cpu.unfolded import UnfoldedConv2d
from slicemod.on_cpu.widened import WidenedConv2d, WidenedLinear
from slicemod.torch_internals import has_onednn
from tests.on_cpu.convolutions import assert_same_bits, bits, convolution, image, unet

pytestmark = pytest.mark.skipif(not has_onednn, reason="PyTorch has no oneDNN here")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    if chosen == torch.float16 and cpu_products(chosen) is not None:
        pytest.skip("float16 that the CPU multiplies stays as it is")
    return chosen


def expected(dtype: torch.dtype) -> set[type[nn.Module]]:
    """The classes that modules of this dtype become on this CPU."""
    if dtype == torch.float32:
        return {UnfoldedConv2d}
    return {WidenedConv2d, WidenedLinear} if cpu_products(dtype) is None else {PackedConv2d}


def small_vae(dtype: torch.dtype) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).to(dtype)


@pytest.mark.parametrize("swapped", ["before", "after"])
def test_a_unet_gives_what_it_gave_and_is_as_before_afterwards(dtype: torch.dtype, swapped: str) -> None:
    model = unet(dtype).eval()
    given = image(2, 4, 32, 24, dtype=dtype), 7, image(2, 11, 13, dtype=dtype)
    before, parameters, kinds = bits(model), dict(model.named_parameters()), [type(part) for part in model.modules()]
    with torch.no_grad():
        wanted = model(*given).sample
        if swapped == "before":
            swap_attention(model, {"budget": "4MiB"}, feed_forward=True)
        report = prepare_for_cpu(model)
        assert {type(part) for part in model.modules() if isinstance(part, Prepared)} == expected(dtype)
        if swapped == "after":
            swap_attention(model, {"budget": "4MiB"}, feed_forward=True)
        found = model(*given).sample
    assert float((found - wanted).float().norm()) < (0.02 if dtype == torch.bfloat16 else 0.003) * float(wanted.norm())
    if swapped == "after":
        restore_attention(model)
    report.undo()
    report.undo()  # there is nothing left to undo
    restore_attention(model)
    assert [type(part) for part in model.modules()] == kinds
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_same_bits(bits(model), before)


def test_every_convolution_is_prepared_or_named(dtype: torch.dtype) -> None:
    model = unet(dtype)
    with prepare_for_cpu(model) as report:
        convolutions = {name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
        ways = dict(report.ways)
        assert convolutions == ways.keys() - {name for name in ways if isinstance(model.get_submodule(name), nn.Linear)}
        assert report.skipped == ()
        assert str(report).splitlines()[0] == f"prepared {len(ways)} modules for this CPU"
        assert f"  {len(ways)}: {report.ways[0][1]}" in str(report)


def test_copies_and_pickles_are_plain(dtype: torch.dtype) -> None:
    model = nn.Sequential(convolution(dtype), nn.Flatten(2), nn.Linear(7, 5).to(dtype)).requires_grad_()
    before = bits(model)
    prepare_for_cpu(model)
    assert_same_bits(bits(model), before)
    assert not any(tensor.requires_grad for tensor in model.state_dict().values())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(part) for part in other] == [nn.Conv2d, nn.Flatten, nn.Linear]
        assert_same_bits(bits(other), before)
        assert all(parameter.requires_grad for parameter in other.parameters())
    assert isinstance(model[0], Prepared)


def test_converting_a_model_makes_it_plain(dtype: torch.dtype) -> None:
    model = nn.Sequential(convolution(dtype))
    wanted = bits(copy.deepcopy(model).double())
    report = prepare_for_cpu(model)
    model.double()
    assert type(model[0]) is nn.Conv2d
    assert_same_bits(bits(model), wanted)
    report.undo()
    assert_same_bits(bits(model), wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_loaded_is_computed_with(dtype: torch.dtype, assign: bool) -> None:
    model, other, x = nn.Sequential(convolution(dtype)), nn.Sequential(convolution(dtype)), image(1, 37, 5, 3).to(dtype)
    prepare_for_cpu(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_same_bits(bits(model), bits(other))
    with torch.no_grad():
        assert float((model(x) - other(x)).float().norm()) < 0.01 * float(other(x).float().norm())


def test_what_cannot_be_prepared_is_named_with_the_reason() -> None:
    twice, other, changed = (convolution(torch.float32, 5, 5) for _ in range(3))
    other.weight = twice.weight
    vars(changed)["forward"] = changed.forward  # as a program puts its own there
    view = convolution(torch.float32)
    view.weight = nn.Parameter(image(53, 37, 3, 5, dtype=torch.float32)[..., :3])
    hooked = convolution(torch.float32)
    hooked.register_forward_hook(lambda *_: None)
    empty = convolution(torch.float32)
    empty.weight = nn.Parameter(empty.weight[:0])
    compressed = nn.Linear(5, 3)
    del compressed.weight  # as libraries do that keep numbers of few bits
    model = nn.ModuleDict(
        {
            "plain": convolution(torch.float32),
            "twice": twice,
            "other": other,
            "changed": changed,
            "hooked": hooked,
            "groups": convolution(torch.float32, 6, 6, groups=3),
            "reflect": convolution(torch.float32, padding_mode="reflect"),
            "same": convolution(torch.float32, padding="same"),
            "view": view,
            "last": convolution(torch.float32).to(memory_format=torch.channels_last),
            "empty": empty,
            "compressed": compressed,
            "rows": nn.Conv1d(5, 3, 1),
            "float64": convolution(torch.float64),
            "linear": nn.Linear(5, 3),
        }
    )
    report = prepare_for_cpu(model)
    assert report.ways == (("plain", "unfolded where the image is small"),)
    assert dict(report.skipped) == {
        "twice": "another module has the same weight",
        "other": "another module has the same weight",
        "changed": "it is more than a convolution or a linear layer",
        "hooked": "it is more than a convolution or a linear layer",
        "groups": "it has groups",
        "reflect": "its border is not a number of zeros",
        "same": "its border is not a number of zeros",
        "view": "its weight is in channels_last, or a view of another tensor",
        "last": "its weight is in channels_last, or a view of another tensor",
        "empty": "its weight is empty",
        "compressed": "it has no weight",
        "rows": "it is another convolution than nn.Conv2d",
    }
    with pytest.raises(ValueError, match="plain: it is prepared"):
        prepare_for_cpu(nn.ModuleDict({"plain": model["plain"]}))
    with pytest.raises(ValueError, match=r"found none in GELU\. Pass a UNet"):
        prepare_for_cpu(nn.GELU())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module; got str"):
        prepare_for_cpu("unet")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [nn.Linear(2, 3), convolution(torch.float64)], ids=["linear", "float64"])
def test_a_model_that_is_fastest_as_it_is_is_no_error(model: nn.Module) -> None:
    with prepare_for_cpu(model) as report:
        assert (report.ways, report.skipped) == ((), ())
        assert str(report) == "prepared 0 modules for this CPU"


def test_a_weight_that_another_module_has_stays_plain() -> None:
    conv, other = convolution(torch.float32), nn.ConvTranspose2d(53, 37, 3)
    other.weight = conv.weight
    with pytest.raises(ValueError, match="0: another module has the same weight"):
        prepare_for_cpu(nn.Sequential(conv, other))


def test_undoing_finds_modules_that_were_moved_and_is_not_stopped_by_others(dtype: torch.dtype) -> None:
    model = nn.Sequential(convolution(dtype), convolution(dtype, 53), convolution(dtype, 53))
    before = bits(model)
    report = prepare_for_cpu(model)
    first, removed = model[0], model[1]
    model[0] = nn.Sequential(first)  # as an adapter wraps it
    del model[1]
    with torch.device("meta"):
        report.undo()
    assert type(first) is type(removed) is type(model[1]) is nn.Conv2d
    assert_same_bits(bits(nn.Sequential(first, removed, model[1])), before)


def test_what_is_added_afterwards_is_prepared_by_another_call(dtype: torch.dtype) -> None:
    model = nn.Sequential(convolution(dtype))
    first = prepare_for_cpu(model)
    model.append(convolution(dtype, 53))
    with prepare_for_cpu(model) as second:
        assert [name for name, _ in second.ways] == ["1"]
        assert second.skipped == (("0", "it is prepared"),)
    assert [isinstance(part, Prepared) for part in model] == [True, False]
    first.undo()


def test_if_preparing_fails_nothing_stays_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(convolution(), convolution(channels=53))
    before, calls = bits(model), []

    def fails_at_last(self: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Prepared, "prepare", fails_at_last)
    monkeypatch.setattr(prepare, "cpu_products", lambda dtype: None)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        prepare_for_cpu(model)
    assert [type(part) for part in model] == [nn.Conv2d] * 2
    assert_same_bits(bits(model), before)


def test_a_vae_has_strips_or_is_prepared(dtype: torch.dtype) -> None:
    vae = small_vae(dtype)
    with swap_vae(vae, "1MiB"), pytest.raises(ValueError, match="a VAE that computes in strips"):
        prepare_for_cpu(vae)
    with prepare_for_cpu(vae), pytest.raises(ValueError, match="it is prepared for the CPU"):
        swap_vae(vae, "1MiB")


def test_one_image_without_a_batch_is_taken(dtype: torch.dtype) -> None:
    conv, x = convolution(dtype), image(37, 5, 3, dtype=dtype)
    with torch.no_grad():
        wanted: Tensor = conv(x)
        with prepare_for_cpu(nn.Sequential(conv)):
            assert torch.equal(conv(x), wanted)
