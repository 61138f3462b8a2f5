"""Packed convolutions compute what plain ones do, and give their weights back in every bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slicemod import prepare_for_cpu
from slicemod.bench.memory import peak_memory
from slicemod.half_precision import cpu_products
from slicemod.on_cpu import packed, prepare
from slicemod.on_cpu.packed import PackedConv2d
from slicemod.torch_internals import has_onednn, pack_convolution
from tests.on_cpu.convolutions import SHAPES, assert_as_exact, assert_same_bits, bits, convolution, image, shaped, unet

pytestmark = pytest.mark.skipif(not has_onednn, reason="PyTorch has no oneDNN here")


@pytest.fixture(autouse=True, params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Convolutions in float32 are packed here too, so that these tests run on CPUs that do not multiply bfloat16."""
    chosen: torch.dtype = request.param
    if chosen == torch.bfloat16 and cpu_products(chosen) is None:
        pytest.skip("oneDNN does not multiply bfloat16 on this CPU")
    monkeypatch.setattr(prepare, "UnfoldedConv2d", PackedConv2d)
    return chosen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_as_exact_as_plain_in_bfloat16(
    shape: tuple[Any, ...], bias: bool, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    conv, x = shaped(shape, dtype, bias=bias), image(2, shape[0], 19, 23, dtype=dtype).to(memory_format=layout)
    with torch.no_grad():
        plain = conv(x)
        with prepare_for_cpu(nn.Sequential(conv)):
            assert isinstance(conv, PackedConv2d)
            found = conv(x)
    if dtype == torch.bfloat16:
        assert_as_exact(found, plain, conv, x)
    else:
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_undone_it_has_the_same_parameters_with_their_bits_and_strides(dtype: torch.dtype) -> None:
    model = unet(dtype)
    if dtype == torch.bfloat16:
        model.to(memory_format=torch.channels_last)
    before, parameters = bits(model), dict(model.named_parameters())
    strides = {name: parameter.stride() for name, parameter in parameters.items()}
    with prepare_for_cpu(model):
        assert any(isinstance(part, PackedConv2d) for part in model.modules())
    assert_same_bits(bits(model), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides


def test_packed_weights_take_the_place_of_plain_ones(dtype: torch.dtype) -> None:
    conv = convolution(dtype, channels=64, outputs=128)
    prepare_for_cpu(nn.Sequential(conv))
    assert isinstance(conv, PackedConv2d)
    assert conv._plain.untyped_storage().nbytes() == 0


def test_state_dicts_copies_and_pickles_of_packed_weights_are_plain(dtype: torch.dtype) -> None:
    conv = convolution(dtype).requires_grad_()
    before = bits(conv)
    prepare_for_cpu(nn.Sequential(conv))
    assert_same_bits(bits(conv), before)
    assert_same_bits(bits(copy.deepcopy(conv)), before)
    assert type(copy.deepcopy(conv)) is nn.Conv2d
    assert not any(tensor.requires_grad for tensor in conv.state_dict().values())


def test_converting_makes_it_plain(dtype: torch.dtype) -> None:
    conv = convolution(dtype)
    wanted = bits(copy.deepcopy(conv).double())
    prepare_for_cpu(nn.Sequential(conv))
    assert_same_bits(bits(conv.double()), wanted)
    assert type(conv) is nn.Conv2d


def test_an_image_without_a_batch_is_taken(dtype: torch.dtype) -> None:
    conv, x = convolution(dtype), image(37, 13, 11, dtype=dtype)
    with torch.no_grad():
        wanted = conv(x)
        with prepare_for_cpu(nn.Sequential(conv)):
            assert torch.equal(conv(x), wanted)


def test_a_call_of_a_small_image_takes_no_memory_for_weights(dtype: torch.dtype) -> None:
    conv, x = convolution(dtype, channels=640, outputs=640), image(1, 640, 8, 8, dtype=dtype)
    with torch.no_grad():
        conv(x)
        plain = peak_memory(lambda: conv(x))
        with prepare_for_cpu(nn.Sequential(conv)):
            ours = peak_memory(lambda: conv(x))
    assert ours < plain / 5


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_makes_it_plain_with_what_was_loaded(assign: bool, dtype: torch.dtype) -> None:
    model, other = nn.Sequential(convolution(dtype)), nn.Sequential(convolution(dtype))
    prepare_for_cpu(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert type(model[0]) is nn.Conv2d
    assert_same_bits(bits(model), bits(other))


def test_weights_that_are_written_to_are_an_error(dtype: torch.dtype) -> None:
    conv = convolution(dtype)
    prepare_for_cpu(nn.Sequential(conv))
    with pytest.raises(RuntimeError, match="expects MKL-DNN tensor"):  # as adapters are merged
        conv.weight.data += torch.ones(53, 37, 3, 3, dtype=dtype)


def test_a_call_that_needs_gradients_says_what_to_do(dtype: torch.dtype) -> None:
    trained = convolution(dtype).requires_grad_()
    for conv, x in (
        (trained, image(1, 37, 7, 5, dtype=dtype)),
        (convolution(dtype), image(1, 37, 7, 5, dtype=dtype).requires_grad_()),
    ):
        report = prepare_for_cpu(nn.Sequential(conv))
        with pytest.raises(RuntimeError, match=r"got a call that needs gradients\. Call undo\(\)"):
            conv(x)
        report.undo()
        conv(x).sum().backward()
    assert trained.weight.grad is not None


def test_what_is_not_a_plain_call_is_computed_by_plain_weights(dtype: torch.dtype) -> None:
    conv, x = convolution(dtype), image(1, 37, 13, 11, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.float16 if dtype == torch.float32 else torch.bfloat16):
        wanted = conv(x.float())
        with prepare_for_cpu(nn.Sequential(conv)):
            assert torch.equal(conv(x.float()), wanted)
    around = convolution(dtype, padding_mode="circular").requires_grad_(False)
    around.load_state_dict(conv.state_dict())
    with torch.no_grad(), prepare_for_cpu(nn.Sequential(conv)):
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = around._reversed_padding_repeated_twice
        torch.testing.assert_close(conv(x), around(x))


def test_a_graph_has_plain_convolutions_or_none(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(convolution(dtype)), image(1, 37, 13, 11, dtype=dtype)
    prepare_for_cpu(model)
    with torch.no_grad(), pytest.raises(Exception, match="packed convolutions: expected inference"):
        torch.compile(model, fullgraph=True, backend="eager")(x)


def test_a_parameter_packed_and_unpacked_in_inference_mode_can_be_trained(dtype: torch.dtype) -> None:
    conv, x = convolution(dtype).requires_grad_(), image(1, 37, 7, 5, dtype=dtype)
    with torch.inference_mode(), prepare_for_cpu(nn.Sequential(conv)):
        conv(x)
    assert not conv.weight.is_inference()
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_whether_weights_are_trained_can_be_said_while_they_are_packed(wanted: bool, dtype: torch.dtype) -> None:
    model, x = nn.Sequential(convolution(dtype, bias=False)).requires_grad_(not wanted), image(1, 37, 7, 5, dtype=dtype)
    report = prepare_for_cpu(model)
    model.requires_grad_(wanted)
    if wanted:
        with pytest.raises(RuntimeError, match="needs gradients"):
            model(x)
    else:
        model(x)
    assert copy.deepcopy(model)[0].weight.requires_grad == wanted
    report.undo()
    assert model[0].weight.requires_grad == wanted


def test_a_copy_refers_to_itself_where_the_original_does(dtype: torch.dtype) -> None:
    conv = convolution(dtype)
    prepare_for_cpu(nn.Sequential(conv))
    vars(conv)["owner"] = [conv]
    other = copy.deepcopy(conv)
    assert vars(other)["owner"][0] is other


def test_if_packing_fails_nothing_stays_packed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = nn.Sequential(convolution(dtype), convolution(dtype, channels=53))
    before, calls = bits(model), []

    def fails_at_last(weight: Tensor, *sizes: Any) -> Tensor:
        calls.append(weight)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pack_convolution(weight, *sizes)  # type: ignore[no-any-return]

    monkeypatch.setattr(packed, "pack_convolution", fails_at_last)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        prepare_for_cpu(model)
    assert [type(part) for part in model] == [nn.Conv2d] * 2
    assert_same_bits(bits(model), before)
