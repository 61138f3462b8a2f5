"""Feed-forwards by oneDNN's fused products: as exact, in no more memory than planned, and only if nothing is missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from ldm.modules.attention import FeedForward as LDMFeedForward
from torch import nn

from slicemod.bench.memory import peak_memory
from slicemod.feed_forward.fused import FusedFeedForward, fused, fused_is_faster, is_amd
from slicemod.feed_forward.gates import gate_of
from slicemod.feed_forward.layer import SlicedFeedForward
from slicemod.feed_forward.sizes import first_projection
from slicemod.torch_internals import has_onednn, multiplies_bfloat16

TOKENS, CHANNELS = 1021, 317
FUSED_DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if fused_is_faster(dtype)]
LAYERS: dict[str, Any] = {
    **{
        name: lambda name=name, **more: FeedForward(CHANNELS, activation_fn=name, **more)
        for name in ("geglu", "gelu", "gelu-approximate", "linear-silu", "swiglu")
    },
    "without biases": lambda: FeedForward(CHANNELS, activation_fn="geglu", bias=False),
    "LDM": lambda: LDMFeedForward(CHANNELS),
    "LDM gated": lambda: LDMFeedForward(CHANNELS, glu=True),
}


def inference(make: Any, dtype: torch.dtype) -> Any:
    return make().to(dtype).eval().requires_grad_(False)


@pytest.mark.skipif(not has_onednn, reason="this PyTorch was built without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_fused_products_are_as_exact_as_the_modules(make: Any, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16")
    whole, x = inference(make, dtype), torch.randn(TOKENS, CHANNELS, dtype=dtype)
    gate = gate_of(whole.net[0])
    assert gate is not None
    ours, theirs = FusedFeedForward(first_projection(whole.net[0]), gate, whole.net[2]).compute(x), whole(x)
    oracle = whole.double()(x.double())
    of_ours, of_theirs = ((found - oracle).square().mean().sqrt() for found in (ours, theirs))
    assert ours.dtype == dtype
    assert of_ours <= (1.7 if dtype == torch.float32 else 1.0) * of_theirs


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_takes_them_in_no_more_memory_than_planned(make: Any, dtype: torch.dtype) -> None:
    layer = SlicedFeedForward(inference(make, dtype).net)
    x = torch.randn(3, TOKENS, CHANNELS, dtype=dtype)
    layer(x)
    assert layer.plan is not None
    parts = fused(layer.net, x.flatten(0, 1), layer.plan.tokens)
    assert parts is not None
    torch.testing.assert_close(
        layer(x)[:, -1], parts.compute(x[:, -1]), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2
    )
    assert peak_memory(lambda: layer(x)) - x.nbytes <= 0.8 * layer.plan.peak_bytes


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the setting for oneDNN as a whole
@pytest.mark.parametrize("dtype", FUSED_DTYPES[:1], ids=str)
def test_what_does_more_than_products_is_called_as_modules(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, CHANNELS, dtype=dtype)

    def is_fused(net: Any, tokens: Any = x, rows: int = TOKENS) -> bool:
        return fused(net, tokens, rows) is not None

    net = inference(LAYERS["geglu"], dtype).net
    assert is_fused(net)
    assert not is_fused(net, rows=2)
    assert not is_fused(net, x.double())
    assert not is_fused(net, x.t().contiguous().t())
    assert not is_fused(net, x.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(net)
    for part in list(net.modules())[1:]:
        hook = part.register_forward_hook(lambda *_: None)
        assert not is_fused(net)
        hook.remove()
    net[2].weight.requires_grad_()
    assert not is_fused(net)
    with torch.no_grad():
        assert is_fused(net)

    dropping = FeedForward(CHANNELS, activation_fn="geglu", dropout=0.5, final_dropout=True).requires_grad_(False)
    assert not is_fused(dropping.to(dtype).net)
    assert is_fused(dropping.eval().net)
    other: Any = inference(LAYERS["swiglu"], dtype).net
    other[0].activation = nn.Tanh()
    assert not is_fused(other)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_fused(net)


@pytest.mark.skipif(not fused_is_faster(torch.float32), reason="for AMD's processors with AVX-512")
def test_what_onednn_sums_with_twice_the_error_is_left_to_pytorch() -> None:
    for channels, is_fused in ((640, True), (641, False)):
        net = inference(lambda channels=channels: FeedForward(channels, activation_fn="geglu"), torch.float32).net
        assert (fused(net, torch.randn(TOKENS, channels), TOKENS) is not None) == is_fused


def test_linux_tells_whose_processor_it_is(tmp_path: Path) -> None:
    amd, intel = tmp_path / "amd", tmp_path / "intel"
    amd.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n", encoding="utf-8")
    intel.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n", encoding="utf-8")
    assert [is_amd(amd), is_amd(intel), is_amd(tmp_path / "none")] == [True, False, False]
