"""swap_attention and restore_attention on any model; the hosts' own tests are under adapters/."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from torch import Tensor, nn

import slicemod
from slicemod import swap
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig
from slicemod.swap import restore_attention, swap_attention

MATH = {"kernel": "math", "steps": 3}


def blocks() -> nn.Sequential:
    """Two transformer blocks: layers 0.attn1, 0.attn2, 1.attn1 and 1.attn2."""
    return nn.Sequential(*(BasicTransformerBlock(32, 2, 16, context_dim=None, checkpoint=False) for _ in range(2)))


def names(report: slicemod.SwapReport) -> list[str]:
    return [layer.name for layer in report.layers]


ALL = ["0.attn1", "0.attn2", "1.attn1", "1.attn2"]


def test_every_layer_is_swapped_and_reported_by_its_path() -> None:
    model = blocks()
    report = swap_attention(model, MATH)
    assert names(report) == ALL
    assert report.skipped == ()
    for layer in report.layers:
        assert isinstance(model.get_submodule(layer.name), MemoryAwareCrossAttention)
        assert (layer.host, layer.slicing) == ("CompVis LDM", SliceConfig(kernel="math", steps=3))


@pytest.mark.parametrize("slicing", [None, MATH, SliceConfig(**MATH)], ids=["none", "dict", "config"])  # type: ignore[arg-type]
def test_settings_come_in_any_form(slicing: Any) -> None:
    assert {layer.slicing for layer in swap_attention(blocks(), slicing).layers} == {SliceConfig.of(slicing)}


def test_unknown_settings_leave_the_model_alone() -> None:
    model = blocks()
    before = list(model.modules())
    with pytest.raises(ValueError, match="'chunks'"):
        swap_attention(model, {"chunks": 3})
    assert list(model.modules()) == before


def test_filter_fn_chooses_by_path_and_module() -> None:
    model = blocks()
    asked: list[tuple[str, nn.Module]] = []

    def only_self_attention(name: str, module: nn.Module) -> bool:
        asked.append((name, module))
        return name.endswith("attn1")

    before = dict(model.named_modules())
    report = swap_attention(model, MATH, filter_fn=only_self_attention)
    assert asked == [(name, before[name]) for name in ALL]
    assert names(report) == ["0.attn1", "1.attn1"]
    assert report.skipped == (("0.attn2", "filter_fn said no"), ("1.attn2", "filter_fn said no"))
    assert model.get_submodule("0.attn2") is before["0.attn2"]


def test_a_second_swap_changes_the_settings_and_nothing_else() -> None:
    model = blocks()
    swap_attention(model, MATH)
    before = list(model.modules())
    report = swap_attention(model, {"kernel": "math", "steps": 5})
    assert list(model.modules()) == before
    assert names(report) == ALL
    model(torch.randn(2, 61, 32))
    assert {plan.steps for plan in report.attention_plans.values()} == {5}


def test_restore_gives_back_the_same_objects_and_says_how_many() -> None:
    model = blocks()
    before = list(model.named_modules())
    swap_attention(model, MATH)
    swap_attention(model, {"steps": 5})
    assert restore_attention(model) == 4
    assert list(model.named_modules()) == before
    assert restore_attention(model) == 0


def test_swap_after_restore_is_a_first_swap() -> None:
    model, x = blocks(), torch.randn(2, 61, 32)
    expected = model(x)
    for _ in range(3):
        swap_attention(model, MATH)
        torch.testing.assert_close(model(x), expected)
        restore_attention(model)
        assert torch.equal(model(x), expected)


def test_a_layer_that_was_ours_from_the_start_is_no_swapped_one() -> None:
    model = nn.Sequential(MemoryAwareCrossAttention(32), CrossAttention(32))
    report = swap_attention(model, MATH)
    assert names(report) == ["1"]
    assert restore_attention(model) == 1
    assert isinstance(model[0], MemoryAwareCrossAttention)


@pytest.mark.parametrize("model", [nn.Linear(3, 5), nn.Sequential(nn.Linear(3, 5), nn.ReLU())], ids=["leaf", "tree"])
def test_nothing_to_swap_is_an_error_that_names_the_model(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"found none in {type(model).__name__}") as caught:
        swap_attention(model)
    assert "CompVis LDM, diffusers" in str(caught.value)


def test_a_filter_that_leaves_nothing_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="only such as cannot be swapped") as caught:
        swap_attention(blocks(), filter_fn=lambda name, module: False)
    assert "0.attn1: filter_fn said no." in str(caught.value)


def test_the_report_reads_as_a_list_with_the_plans_of_the_last_calls() -> None:
    model = blocks()
    report = swap_attention(model, MATH, filter_fn=lambda name, module: name != "1.attn2")
    assert str(report) == (
        "swapped 3 attention layers (budget='auto', policy='exact', kernel='math', steps=3), skipped 1\n"
        "  0.attn1 (CompVis LDM): CrossAttention -> MemoryAwareCrossAttention\n"
        "  0.attn2 (CompVis LDM): CrossAttention -> MemoryAwareCrossAttention\n"
        "  1.attn1 (CompVis LDM): CrossAttention -> MemoryAwareCrossAttention\n"
        "  1.attn2: skipped, filter_fn said no"
    )
    model(torch.randn(2, 61, 32))
    assert str(report).count("; last plan: math, 3 x 21 rows, ") == 3


def test_a_pipeline_is_an_error_that_says_what_to_pass() -> None:
    pipeline: Any = type("StableDiffusionPipeline", (), {"unet": blocks()})()
    for call in (swap_attention, restore_attention):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got StableDiffusionPipeline. Pass"):
            call(pipeline)


def test_a_module_with_the_name_alone_is_not_mistaken_for_attention() -> None:
    class CrossAttention(nn.Module):  # no projections
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"found none.*sliced_sdpa\(\.\.\.\)\.install\(model\)"):
        swap_attention(nn.Sequential(CrossAttention()))


def test_projections_that_were_replaced_are_an_error_rather_than_lost() -> None:
    layer = CrossAttention(32)
    layer.to_q = nn.Sequential(layer.to_q)
    model = nn.Sequential(layer)
    with pytest.raises((ValueError, TypeError), match="to_q"):
        swap_attention(model)
    assert isinstance(model.get_submodule("0"), CrossAttention)


@pytest.mark.parametrize("places", [("one", "two"), ("a.0", "b.0")], ids=["one parent", "two parents"])
def test_a_layer_in_two_places_is_swapped_in_both(places: tuple[str, str]) -> None:
    layer = CrossAttention(32)
    if places == ("one", "two"):
        model = nn.ModuleDict({"one": layer, "two": layer})
    else:
        model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    swap_attention(model, MATH)
    assert [type(model.get_submodule(place)) for place in places] == [MemoryAwareCrossAttention] * 2
    restore_attention(model)
    assert [model.get_submodule(place) for place in places] == [layer] * 2


def test_hosts_are_registered_by_importing_the_package() -> None:
    assert {host.name for host in swap.HOSTS} == {
        "CompVis LDM",
        "CompVis VAE",
        "VAE",
        "diffusers",
        "feed-forward",
        "lookalikes",
        "sd-scripts",
    }


def test_a_with_statement_gives_the_same_objects_back() -> None:
    model, x = blocks(), torch.randn(2, 61, 32)
    before, expected = list(model.named_modules()), model(x)
    with swap_attention(model, MATH) as report:
        assert names(report) == ALL
        torch.testing.assert_close(model(x), expected)
        assert all(layer.plan is not None for layer in report.layers)
    assert list(model.named_modules()) == before
    assert torch.equal(model(x), expected)


def test_a_with_statement_restores_after_an_exception_and_lets_it_pass() -> None:
    model = blocks()
    before = list(model.named_modules())
    with pytest.raises(KeyError, match="step 7"), swap_attention(model, MATH):
        raise KeyError("step 7")
    assert list(model.named_modules()) == before


def test_an_inner_with_statement_gives_back_the_settings_of_the_outer_one() -> None:
    model = blocks()

    def steps() -> list[int | None]:
        return [vars(model.get_submodule(name))["slicing"].steps for name in ALL]

    with swap_attention(model, MATH, filter_fn=lambda name, module: name != "1.attn2"):
        with swap_attention(model, {"kernel": "math", "steps": 5}) as inner:
            assert steps() == [5, 5, 5, 5]
            assert [layer.before is None for layer in inner.layers] == [False, False, False, True]
        assert type(model.get_submodule("1.attn2")) is CrossAttention
        swap_attention(model, MATH, filter_fn=lambda name, module: name == "1.attn2")
        assert steps() == [3, 3, 3, 3]
    assert [type(model.get_submodule(name)) for name in ALL[:3]] == [CrossAttention] * 3
    assert isinstance(model.get_submodule("1.attn2"), MemoryAwareCrossAttention)  # a swap of its own


def test_leaving_a_with_statement_after_restoring_by_hand_changes_nothing() -> None:
    model = blocks()
    before = list(model.named_modules())
    with swap_attention(model, MATH):
        restore_attention(model)
    assert list(model.named_modules()) == before


def test_a_report_kept_with_its_model_can_be_copied_and_pickled() -> None:
    model = blocks()
    kept = {"model": model, "report": swap_attention(model, MATH)}
    other: dict[str, Any] = pickle.loads(pickle.dumps(copy.deepcopy(kept)))
    other["model"](torch.randn(2, 61, 32))
    assert all(layer.plan is not None for layer in other["report"].layers)
    assert kept["report"].layers[0].plan is None  # type: ignore[attr-defined]
    with other["report"]:
        pass
    assert type(other["model"].get_submodule("0.attn1")) is CrossAttention
    assert isinstance(model.get_submodule("0.attn1"), MemoryAwareCrossAttention)


def test_backward_hooks_work_on_whichever_layer_is_there() -> None:
    model, x = blocks(), torch.randn(2, 61, 32, requires_grad=True)
    calls: list[str] = []

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        assert grad_input[0].shape == grad_output[0].shape == x.shape
        calls.append(type(module).__name__)

    first = model.get_submodule("0.attn1").register_full_backward_hook(hook)
    swap_attention(model, MATH)
    second = model.get_submodule("1.attn1").register_full_backward_hook(hook)
    model(x).sum().backward()
    assert calls == ["MemoryAwareCrossAttention"] * 2
    restore_attention(model)
    model(x).sum().backward()
    assert calls[2:] == ["CrossAttention"] * 2
    first.remove()
    second.remove()
    model(x).sum().backward()
    assert len(calls) == 4


def test_projections_that_were_wrapped_after_the_swap_stay_wrapped() -> None:
    """As LoRA does."""

    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = 2 * self.base(x)
            return output

    model, x = blocks(), torch.randn(2, 61, 32)
    plain = model(x)
    swap_attention(model, MATH)
    layer: Any = model.get_submodule("0.attn1")
    layer.to_v = Doubled(layer.to_v)
    expected, keys = model(x), list(model.state_dict())
    assert not torch.allclose(expected, plain)
    restore_attention(model)
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys
    layer = model.get_submodule("0.attn1")
    layer.to_v = layer.to_v.base
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("first", ["swap", "ddp"])
def test_distributed_data_parallel_trains_a_model_that_is_swapped_before_or_after(first: str, tmp_path: Path) -> None:
    model, x = blocks(), torch.randn(2, 61, 32)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if first == "swap":
            swap_attention(model, MATH)
        parallel = nn.parallel.DistributedDataParallel(model)
        if first == "ddp":
            assert names(swap_attention(parallel, MATH)) == [f"module.{name}" for name in ALL]
        parallel(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-3)


# Swaps that others undo.


def diffusers_unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=23,
    )


TAKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "set_attn_processor": (lambda model: model.set_attn_processor(AttnProcessor2_0()), "AttnProcessor2_0"),
    "set_attention_slice": (lambda model: model.set_attention_slice(1), "SlicedAttnProcessor"),
    "fuse_qkv_projections": (lambda model: model.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
}


@pytest.mark.parametrize(("take", "processor"), TAKEN.values(), ids=TAKEN.keys())
def test_a_swap_that_diffusers_undid_is_named_by_the_report_and_when_it_is_restored(
    take: Callable[[Any], None], processor: str
) -> None:
    model = diffusers_unet()
    report = swap_attention(model, MATH)
    assert report.check() == ()
    assert "no longer" not in str(report)
    take(model)
    reason = f"its attention is that of {processor}"
    with pytest.warns(UserWarning, match=rf"8 of 8 layers that were swapped are so no longer: .*: {reason}"):
        lost = report.check()
    assert lost == tuple((layer.name, reason) for layer in report.layers)
    assert f"{report.layers[3].name}: no longer swapped, {reason}" in str(report)
    with pytest.warns(UserWarning, match=f"8 layers of UNet2DConditionModel were changed .* not restored, {reason}"):
        assert restore_attention(model) == 0
    assert {type(found).__name__ for found in model.attn_processors.values()} == {processor}
    assert restore_attention(model) == 0  # said once


def test_leaving_a_with_statement_names_what_is_no_longer_swapped() -> None:
    model = diffusers_unet()
    with pytest.warns(UserWarning, match="8 layers .* that of AttnProcessor2_0"), swap_attention(model, MATH):
        model.set_attn_processor(AttnProcessor2_0())
    assert len(swap_attention(model, MATH).layers) == 8


def test_a_second_swap_is_no_loss_and_ends_one() -> None:
    model = diffusers_unet()
    first = swap_attention(model, MATH)
    second = swap_attention(model, {"kernel": "math", "steps": 5})
    assert first.check() == second.check() == ()
    model.set_attn_processor(AttnProcessor2_0())
    third = swap_attention(model, MATH)
    assert third.check() == ()
    assert restore_attention(model) == 8
    assert {type(found) for found in model.attn_processors.values()} == {AttnProcessor2_0}


def test_layers_that_left_the_model_or_were_restored_are_named() -> None:
    model = blocks()
    report = swap_attention(model, MATH)
    vars(model.get_submodule("0"))["_modules"]["attn1"] = nn.Identity()
    vars(model.get_submodule("0"))["_modules"]["attn2"] = CrossAttention(32)
    with pytest.warns(UserWarning, match="2 of 4 layers that were swapped are so no longer"):
        lost = report.check()
    assert lost == (("0.attn1", "no known attention is there"), ("0.attn2", "its attention is that of CrossAttention"))


# Models that are swapped in part.


def hunyuan_video() -> nn.Module:
    model: nn.Module = HunyuanVideoTransformer3DModel(
        in_channels=3,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=5,
        num_refiner_layers=2,
        patch_size=1,
        guidance_embeds=False,
        text_embed_dim=23,
        pooled_projection_dim=11,
        rope_axes_dim=(2, 4, 4),
    )
    return model


def test_a_model_that_is_swapped_in_part_says_so_with_the_blocks_left_out() -> None:
    with pytest.warns(UserWarning, match="HunyuanVideoTransformer3DModel was swapped in part") as caught:
        report = swap_attention(hunyuan_video(), MATH)
    reason = "its processor HunyuanVideoAttnProcessor2_0 computes something else than plain attention"
    assert [str(warning.message) for warning in caught] == [
        "HunyuanVideoTransformer3DModel was swapped in part: 2 attention layers were, 6 were left as they are and take "
        f"the memory they took: transformer_blocks.0.attn: {reason} with added projections; "
        "single_transformer_blocks.0.attn to single_transformer_blocks.4.attn (5): "
        f"{reason}. The report has all of them; leave them out by "
        "filter_fn to swap the others without this warning."
    ]
    assert caught[0].filename == __file__
    assert len(report.skipped) == 6


def test_layers_that_filter_fn_left_out_are_no_reason_to_warn() -> None:
    model = hunyuan_video()
    report = swap_attention(model, MATH, filter_fn=lambda name, module: name.startswith("context_embedder"))
    assert len(report.layers) == 2
    assert {reason for _, reason in report.skipped} == {"filter_fn said no"}


# What is not a model.


def test_a_pipeline_or_what_holds_one_is_an_error_that_names_its_models() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.unet, self.controlnet, self.text_encoder = blocks(), blocks(), nn.Linear(3, 5)

    class LightningModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pipe, self.loss = Pipeline(), nn.MSELoss()

    pipeline: Any = Pipeline()
    for call in (swap_attention, restore_attention):
        with pytest.raises(
            TypeError, match=r"expected a torch.nn.Module; got Pipeline. Pass its unet or controlnet\.$"
        ):
            call(pipeline)
    with pytest.raises(ValueError, match=r"found none in LightningModule. Pass its pipe.unet or pipe.controlnet\.$"):
        swap_attention(LightningModule())
