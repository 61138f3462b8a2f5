"""Attention that others put into classes and layers, as hypernetworks and hooks do: refused by name, or kept."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention import BasicTransformerBlock as DiffusersBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from ldm.modules import attention as ldm_attention
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations

from slicemod.adapters.own_code import replaced_method
from slicemod.attention import MemoryAwareCrossAttention
from slicemod.swap import restore_attention, swap_attention
from tests.oracle import assert_same, with_random_weights

MATH: dict[str, Any] = {"kernel": "math", "steps": 7}

ldm_forward: Callable[..., Tensor] = CrossAttention.forward
block_forward: Callable[..., Tensor] = AttnBlock.forward
processor_call: Callable[..., Tensor] = AttnProcessor2_0.__call__


def ldm() -> nn.Sequential:
    return with_random_weights(nn.Sequential(CrossAttention(26, heads=2, dim_head=13)))


def diffusers(processor: Any = None) -> nn.Sequential:
    layer = Attention(query_dim=26, heads=2, dim_head=13)
    layer.set_processor(AttnProcessor2_0() if processor is None else processor)
    return with_random_weights(nn.Sequential(layer))


def vae() -> nn.Sequential:
    return with_random_weights(nn.Sequential(AttnBlock(32)))


MODELS: dict[str, Callable[[], nn.Sequential]] = {"ldm": ldm, "vae": vae, "diffusers": diffusers}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
tokens_only = pytest.mark.parametrize("make", [ldm, diffusers], ids=["ldm", "diffusers"])


def given(model: nn.Sequential) -> Tensor:
    sizes = (2, 32, 7, 11) if hasattr(model[0], "proj_out") else (2, 61, 26)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(3))


def anything(name: str, module: nn.Module) -> bool:
    return True


def assert_refused(model: nn.Sequential, reason: str) -> None:
    """With and without filter_fn; and the model computes what it did."""
    x, layer = given(model), model[0]
    expected, processor = model(x), getattr(layer, "processor", None)
    for filter_fn in (None, anything):
        with pytest.raises(ValueError, match=f"0: {reason}"):
            swap_attention(model, MATH, filter_fn=filter_fn)
    assert model[0] is layer
    assert getattr(layer, "processor", None) is processor
    torch.testing.assert_close(model(x), expected)


# Patched on the class.


def hypernetwork(self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """As the webui's, which changes the context."""
    return ldm_forward(self, x, context=1.3 * (x if context is None else context), mask=mask)


@functools.wraps(ldm_forward)
def wrapped(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """With the names of what it wraps."""
    return 1.3 * ldm_forward(self, *args, **kwargs)


class Other:
    def forward(self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return 1.3 * ldm_forward(self, x, context, mask)


@pytest.mark.parametrize(
    "patch",
    [hypernetwork, wrapped, Other.forward, functools.partialmethod(hypernetwork)],
    ids=["function", "wrapped", "of another class", "partial"],
)
def test_a_forward_patched_on_ldms_class_is_not_lost(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CrossAttention, "forward", patch)
    assert_refused(ldm(), "forward of its class CrossAttention was replaced")


def test_code_that_was_executed_without_a_modules_name_is_its_classs_own() -> None:
    space: dict[str, Any] = {}
    exec("class Made:\n    def forward(self, x): return x", space)
    assert replaced_method(space["Made"], "forward") is None
    space["Made"].forward = hypernetwork
    assert replaced_method(space["Made"], "forward") is not None


def test_where_the_patch_is_from_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CrossAttention, "forward", hypernetwork)
    with pytest.raises(ValueError, match=r"replaced \(\S*test_own_code.py:\d+\)"):
        swap_attention(ldm())


@pytest.mark.parametrize("module", ["modules.sd_hijack_optimizations", "modules.hypernetworks.hypernetwork"])
@pytest.mark.parametrize(("kind", "make"), [(CrossAttention, ldm), (AttnBlock, vae)], ids=["UNet", "VAE"])
def test_what_the_webui_put_in_keeps_its_hypernetworks_and_says_how_to_get_slicemod(
    kind: type, make: Callable[[], nn.Sequential], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"__name__": module, "former": vars(kind)["forward"]}
    exec("def split_forward(self, x, **more): return 1.3 * former(self, x, **more)", space)
    monkeypatch.setattr(kind, "forward", space["split_forward"])
    assert_refused(make(), "forward of .* by the webui's split_forward, .*hypernetworks; .*`slicemod install webui`")


def test_a_class_that_was_patched_and_put_back_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(CrossAttention, "forward", hypernetwork)
    assert len(swap_attention(ldm()).layers) == 1


def test_a_forward_patched_on_the_vaes_class_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the webui patches it."""

    def cross_attention_attnblock_forward(self: Any, x: Tensor) -> Tensor:
        return 1.3 * block_forward(self, x)

    monkeypatch.setattr(AttnBlock, "forward", cross_attention_attnblock_forward)
    assert_refused(vae(), "forward of its class AttnBlock was replaced")


@pytest.mark.parametrize("name", ["einsum", "default"])
def test_a_function_of_its_module_that_a_forward_calls_counts_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = getattr(ldm_attention, name)
    monkeypatch.setattr(ldm_attention, name, lambda *args: function(*args))
    assert_refused(ldm(), f"{name}, which its forward calls, was replaced")


def test_a_call_patched_on_a_processors_class_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(processor_call)
    def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return processor_call(self, attn, 1.3 * hidden_states, *args, **kwargs)

    monkeypatch.setattr(AttnProcessor2_0, "__call__", call)
    assert_refused(diffusers(), "__call__ of its class AttnProcessor2_0 was replaced")


def test_a_forward_patched_on_diffusers_class_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As prompt-to-prompt patches it: the processor is not called any more."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.to_out[0](self.to_v(hidden_states))
        return output

    monkeypatch.setattr(Attention, "forward", forward)
    assert_refused(diffusers(), "forward of its class Attention was replaced")


def test_what_a_processor_calls_counts_and_what_it_does_not_call_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Attention.get_attention_scores
    monkeypatch.setattr(Attention, "get_attention_scores", lambda self, *args: 0.5 * scores(self, *args))
    assert_refused(diffusers(AttnProcessor()), "get_attention_scores of its class Attention was replaced")
    model = diffusers(AttnProcessor2_0())
    expected = model(given(model))
    swap_attention(model, MATH)
    torch.testing.assert_close(model(given(model)), expected)


# Classes of the same name.


def same_name(base: type, method: str) -> Any:
    """A class of the name of `base` whose method gives twice the result."""

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = 2 * getattr(base, method)(self, *args, **kwargs)
        return output

    doubled.__name__, doubled.__qualname__ = method, f"{base.__name__}.{method}"
    return type(base.__name__, (base,), {method: doubled, "__module__": __name__})


class Twice(CrossAttention):  # type: ignore[misc]
    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        output: Tensor = 2 * super().forward(x, context, mask)
        return output


def test_a_subclass_of_the_same_name_that_does_more_is_left_alone() -> None:
    twice = type("CrossAttention", (Twice,), {})
    model = nn.Sequential(twice(26, heads=2, dim_head=13), CrossAttention(26, heads=2, dim_head=13))
    x = torch.randn(2, 61, 26)
    expected = model(x)
    with pytest.warns(UserWarning, match="0: its class CrossAttention has a forward that slicemod does not know"):
        report = swap_attention(model, MATH)
    assert [layer.name for layer in report.layers] == ["1"]
    torch.testing.assert_close(model(x), expected)


def test_a_subclass_of_the_same_name_that_does_the_same_is_swapped() -> None:
    same = type("CrossAttention", (CrossAttention,), {})
    model = with_random_weights(nn.Sequential(same(26, heads=2, dim_head=13)))
    expected = model(given(model))
    assert len(swap_attention(model, MATH).layers) == 1
    torch.testing.assert_close(model(given(model)), expected)


def test_a_processor_of_the_same_name_from_elsewhere_is_left_alone() -> None:
    model = diffusers(same_name(AttnProcessor2_0, "__call__")())
    assert_refused(model, f"its processor {__name__}.AttnProcessor2_0 is not diffusers' own")


def test_a_diffusers_layer_of_another_package_is_swapped_where_it_is_chosen() -> None:
    model = diffusers()
    model[0].__class__ = type("Attention", (Attention,), {"__module__": "forked"})
    with pytest.raises(
        ValueError, match=r"0: its class forked\.Attention is not diffusers' own; choose it with filter_fn"
    ):
        swap_attention(model)
    expected = model(given(model))
    assert len(swap_attention(model, MATH, filter_fn=anything).layers) == 1
    torch.testing.assert_close(model(given(model)), expected)


# Patched on the object.


def on_the_object(model: nn.Sequential, forward: Callable[..., Tensor]) -> None:
    layer: Any = model[0]
    layer.forward = forward


@every_model
@pytest.mark.parametrize("kind", ["closure", "method", "partial"])
def test_a_forward_that_was_put_on_a_layer_is_not_lost(make: Any, kind: str) -> None:
    """As token merging, HyperTile and prompt-to-prompt put it there."""
    model = make()
    inner = model[0].forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = 2 * inner(*args, **kwargs)
        return output

    forwards: dict[str, Callable[..., Tensor]] = {
        "closure": lambda *args, **kwargs: 2 * inner(*args, **kwargs),
        "method": types.MethodType(doubled, model[0]),
        "partial": functools.partial(doubled, model[0]),
    }
    on_the_object(model, forwards[kind])
    assert_refused(model, "its forward was replaced on the object itself")


def test_a_method_that_was_put_on_a_layer_and_is_called_by_the_processor_is_not_lost() -> None:
    model = diffusers(AttnProcessor())
    layer: Any = model[0]
    inner = layer.head_to_batch_dim
    layer.head_to_batch_dim = lambda *args: 2 * inner(*args)
    assert_refused(model, "its head_to_batch_dim was replaced on the object itself")


def test_a_function_that_a_vaes_block_was_given_is_not_lost() -> None:
    """ComfyUI's blocks have theirs from their own module."""

    class AttnBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels, self.norm = 32, nn.GroupNorm(32, 32)
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(32, 32, 1) for _ in range(4))
            self.attend: Any = torch.add

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = x + self.attend(self.q(x), self.k(x))
            return output

    model = nn.Sequential(block := AttnBlock())
    block.attend = copy.copy
    with pytest.raises(ValueError, match=r"0: its attend is copy.copy, which slicemod does not know"):
        swap_attention(model, filter_fn=anything)


# Hooks that call what was there before.


class Counting(ModelHook):  # type: ignore[misc]
    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(type(module).__name__)
        return (1.3 * args[0], *args[1:]), kwargs


@every_model
def test_a_hook_of_accelerate_runs_around_whichever_layer_is_there(make: Any) -> None:
    model = make()
    plain, hook, kind = model(given(model)), Counting(), type(model[0]).__name__
    add_hook_to_module(model[0], hook)
    expected = model(given(model))
    assert not torch.allclose(expected, plain, rtol=1e-2)
    swap_attention(model, MATH)
    torch.testing.assert_close(model(given(model)), expected, rtol=1e-4, atol=1e-4)
    swapped = type(model[0]).__name__
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(given(model)), expected, rtol=1e-4, atol=1e-4)
    restore_attention(model)
    assert torch.equal(model(given(model)), expected)
    assert hook.calls == [kind, swapped, kind]
    remove_hook_from_module(model[0])
    assert torch.equal(model(given(model)), plain)
    assert len(swap_attention(model, MATH).layers) == 1  # though its forward now is on the object


def test_a_layer_with_a_hook_in_two_places_keeps_it_in_both() -> None:
    layer, hook = ldm()[0], Counting()
    model = nn.Sequential(layer, layer)
    add_hook_to_module(layer, hook)
    expected = model(given(model))
    with swap_attention(model, MATH):
        torch.testing.assert_close(model(given(model)), expected, rtol=1e-4, atol=1e-4)
    assert hook.calls == ["CrossAttention"] * 2 + ["MemoryAwareCrossAttention"] * 2
    assert torch.equal(model(given(model)), expected)


@every_model
def test_a_hook_of_accelerate_may_come_and_go_while_a_layer_is_swapped(make: Any) -> None:
    model = make()
    plain = model(given(model))
    swap_attention(model, MATH)
    add_hook_to_module(model[0], Counting())
    hooked = model(given(model))
    restore_attention(model)
    torch.testing.assert_close(model(given(model)), hooked, rtol=1e-4, atol=1e-4)
    swap_attention(model, MATH)
    remove_hook_from_module(model[0])
    restore_attention(model)
    assert torch.equal(model(given(model)), plain)


@every_model
@pytest.mark.parametrize("whole", [False, True], ids=["each part", "whole layers"])
@pytest.mark.parametrize("first", ["offload", "swap"])
def test_weights_that_accelerate_offloads_are_there_when_they_are_needed(make: Any, whole: bool, first: str) -> None:
    model = make()
    expected = model(given(model)).detach()
    if first == "swap":
        swap_attention(model, MATH)
    if whole:
        add_hook_to_module(model[0], AlignDevicesHook("cpu", offload=True, place_submodules=True))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if first == "offload":
        swap_attention(model, MATH)
    torch.testing.assert_close(model(given(model)), expected, rtol=1e-4, atol=1e-4)
    restore_attention(model)
    assert torch.equal(model(given(model)), expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


class Louder(DiffusersHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 1.3 * output


def test_a_hook_of_diffusers_runs_around_its_swapped_layer() -> None:
    model = diffusers()
    plain = model(given(model))
    registry = HookRegistry.check_if_exists_or_initialize(model[0])
    registry.register_hook(Louder(), "louder")
    swap_attention(model, MATH)
    torch.testing.assert_close(model(given(model)), 1.3 * plain, rtol=1e-4, atol=1e-4)
    registry.remove_hook("louder")
    torch.testing.assert_close(model(given(model)), plain, rtol=1e-4, atol=1e-4)
    restore_attention(model)
    assert torch.equal(model(given(model)), plain)


def test_a_hook_of_diffusers_on_a_layer_that_would_be_replaced_is_not_lost() -> None:
    model = ldm()
    HookRegistry.check_if_exists_or_initialize(model[0]).register_hook(Louder(), "louder")
    assert_refused(model, "its forward was replaced on the object itself")
    add_hook_to_module(model[0], Counting())
    assert_refused(model, "its forward was replaced on the object itself")


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiffusersBlock(26, 2, 13, cross_attention_dim=23) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=context)
        return x


def test_guidance_that_skips_attention_scores_is_kept() -> None:
    """Perturbed-attention guidance takes the place of SDPA while the layer is called."""
    model, x, context = Transformer(), torch.randn(2, 61, 26), torch.randn(2, 5, 23)
    plain = model(x, context)
    skip = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks", **skip))
    expected = model(x, context)
    assert not torch.allclose(expected, plain, rtol=1e-2)
    reason = "its hook layer_skip_hook of diffusers skips the attention's scores"
    with pytest.warns(UserWarning, match=f"blocks.1.attn1: {reason}"):
        report = swap_attention(model, MATH)
    assert [layer.name for layer in report.layers] == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn2"]
    torch.testing.assert_close(model(x, context), expected, rtol=1e-4, atol=1e-4)


# Projections of other makes.


def scaled(linear: nn.Module) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (1.3 * args[0],))
    linear.register_forward_hook(lambda module, args, output: output + 0.1)
    return linear


PROJECTIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hooks": scaled,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": lambda linear: torch.nn.utils.weight_norm(linear),
}


@tokens_only
@pytest.mark.parametrize("change", PROJECTIONS.values(), ids=PROJECTIONS.keys())
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_projections_with_hooks_or_computed_weights_give_the_same(make: Any, change: Any) -> None:
    model = make().eval()
    for part in (model[0].to_q, model[0].to_v, model[0].to_out[0]):
        change(part)
    expected = model(given(model))
    with swap_attention(model, MATH):
        assert_same([model(given(model)).detach()], [expected.detach()])
    assert torch.equal(model(given(model)), expected)


# Compiled by themselves.


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer: nn.Module, backend: Any = "eager") -> nn.Module:
    made: Any = torch.compile(layer, backend=backend)
    module: nn.Module = made
    return module


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_a_layer_that_was_compiled_by_itself_is_not_replaced(in_place: bool, fresh: None) -> None:
    model = ldm()
    x, layer = given(model), model[0]
    expected = model(x)
    if in_place:
        layer.compile(backend="eager")
    else:
        model[0] = compiled(layer)
    with pytest.raises(ValueError, match="it was compiled by itself; compile it after the swap"):
        swap_attention(model, MATH)
    torch.testing.assert_close(model(x), expected)


def test_a_diffusers_layer_that_was_compiled_by_itself_is_swapped(fresh: None) -> None:
    model, counter = diffusers(), CompileCounterWithBackend("eager")
    model[0] = compiled(model[0], counter)
    expected = model(given(model))
    report = swap_attention(model, {"kernel": "math", "budget": "1KiB", "policy": "exact"})
    assert [layer.name for layer in report.layers] == ["0._orig_mod"]
    torch.testing.assert_close(model(given(model)), expected, rtol=1e-4, atol=1e-4)
    assert ["slicemod" in str(graph.code) for graph in counter.graphs] == [False, True]


# What was put on ours is named when it goes.


def test_a_patch_on_our_layer_is_named_when_the_layer_is_restored() -> None:
    model = ldm()
    expected = model(given(model))
    swap_attention(model, MATH)
    forward = model[0].forward
    on_the_object(model, lambda *args, **kwargs: 2 * forward(*args, **kwargs))
    with pytest.warns(UserWarning, match="0: restored, though its forward was replaced on the object itself"):
        assert restore_attention(model) == 1
    assert torch.equal(model(given(model)), expected)


def test_a_layer_of_ours_that_was_compiled_by_itself_is_named_when_it_is_restored(fresh: None) -> None:
    model = ldm()
    swap_attention(model, MATH)
    model[0] = compiled(model[0])
    with pytest.warns(UserWarning, match="0._orig_mod: restored, though it was compiled by itself"):
        restore_attention(model)
    assert isinstance(model.get_submodule("0._orig_mod"), CrossAttention)
    assert not isinstance(model.get_submodule("0._orig_mod"), MemoryAwareCrossAttention)
