"""`prepare_for_cpu`: the convolutions and linear layers of a model as this CPU computes them fastest, for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slicemod.half_precision import cpu_products
from slicemod.layers.plain_module import runs_alone
from slicemod.on_cpu.packed import PackedConv2d
from slicemod.on_cpu.prepared import Prepared
from slicemod.on_cpu.unfolded import UnfoldedConv2d
from slicemod.on_cpu.widened import WidenedConv2d, WidenedLinear
from slicemod.torch_internals import has_onednn
from slicemod.vae.half import StripwiseHalf

# What is prepared, or named as skipped.
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_KINDS = *_CONVOLUTIONS, nn.Linear


@dataclass(frozen=True)
class PreparedForCpu:
    """What `prepare_for_cpu` did. As a context manager it undoes it at the end.

    Attributes:
        ways: path of each module that was prepared, and how it computes now.
        skipped: path and reason of each convolution and linear layer that stays as it is, but for those that PyTorch
            computes at full speed.
        modules: the prepared modules.
    """

    ways: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    modules: tuple[nn.Module, ...] = field(repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"prepared {len(self.ways)} modules for this CPU"]
        lines += [f"  {count}: {way}" for way, count in Counter(way for _, way in self.ways).items()]
        lines += [f"  skipped {count}: {reason}" for reason, count in Counter(why for _, why in self.skipped).items()]
        return "\n".join(lines)

    def undo(self) -> None:
        """Make the modules plain again, but for those that are so already. Their weights keep every bit."""
        _make_plain(self.modules)

    def __enter__(self) -> PreparedForCpu:
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()


def prepare_for_cpu(model: nn.Module) -> PreparedForCpu:
    """Have a model's convolutions and linear layers compute as this CPU does fastest, for inference.

    - float32: a convolution whose image is much smaller than its weight multiplies the unfolded image.
    - bfloat16 that the CPU multiplies: weights of convolutions are packed, that is, kept as oneDNN multiplies by them.
    - half precision that it does not multiply: convolutions and linear layers compute in float32, some channels at a
      time.

    The weights take no more memory than before. In float32, and in bfloat16 that the CPU multiplies, a call takes no
    more than a plain one and a copy of an image. In half precision that it does not multiply, a convolution takes
    copies in float32 of one image, unfolded if it is small, of its output, and of up to 16 MiB of the weight; a linear
    layer takes 2 MiB and 1 KiB for each channel. Results differ by rounding.

    State dicts, copies and pickles hold plain modules. `model.to(...)` makes modules plain again, and so does loading a
    state dict where weights are packed. Calls that need gradients and graphs of `torch.compile` compute as before.
    Where weights are packed, calls that need gradients and whole graphs (`fullgraph=True`) raise an error until
    `undo()`.

    Args:
        model: a UNet, a transformer or another model whose weights are on the CPU. It is changed in place.

    Returns:
        What was prepared and how, and what was skipped and why. Its `undo()`, or the end of a `with` statement, undoes
        it.

    Raises:
        TypeError: the model is not a module.
        ValueError: it has no convolutions and linear layers, or some that might be faster, of which none can be
            prepared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}. Pass the UNet itself.")
    if any(isinstance(module, StripwiseHalf) for module in model.modules()):
        raise ValueError(
            f"model: expected one without a VAE that computes in strips, as strips multiply by plain weights; got "
            f"{type(model).__name__} after swap_vae. Pass the UNet, or restore_attention(model) first."
        )
    chosen, skipped = choose_ways(model)
    if not chosen and (skipped or not any(isinstance(module, _KINDS) for module in model.modules())):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise ValueError(
            f"model: expected convolutions or linear layers that can be prepared; {reasons or 'found none'} in "
            f"{type(model).__name__}. Pass a UNet whose weights are on the CPU."
        )
    prepared = []
    try:
        for chose in chosen:
            chose.module.__class__ = chose.becomes
            prepared.append(chose.module)
            chose.module.prepare()  # type: ignore[operator]
    except BaseException:
        _make_plain(prepared)
        raise
    ways = tuple((chose.name, chose.becomes.way) for chose in chosen)
    return PreparedForCpu(ways, tuple(skipped), tuple(prepared))


class ChosenWay(NamedTuple):
    """A module by its path, and the class that it is to become."""

    name: str
    module: nn.Module
    becomes: type[Prepared]


def choose_ways(model: nn.Module, device_type: str = "cpu") -> tuple[list[ChosenWay], list[tuple[str, str]]]:
    """What is to be prepared, and path and reason of each module that stays as it is although it might be faster.

    Args:
        model: is not changed.
        device_type: where its weights are: "meta" to plan it.
    """
    uses = Counter(id(given) for module in model.modules() for given in module.parameters(recurse=False))
    chosen, skipped = [], []
    for name, module in model.named_modules():
        becomes = _chosen(module, device_type, uses) if isinstance(module, _KINDS) else None
        if isinstance(becomes, str):
            skipped.append((name, becomes))
        elif becomes is not None:
            chosen.append(ChosenWay(name, module, becomes))
    return chosen, skipped


def _make_plain(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, Prepared):
            module.make_plain()


def _chosen(module: Any, device_type: str, uses: Counter[int]) -> type[Prepared] | str | None:
    """The class that a module is to become, or the reason why none; None if it is fastest as it is."""
    weight, is_linear = getattr(module, "weight", None), isinstance(module, nn.Linear)
    if not isinstance(weight, Tensor):
        return "it has no weight"  # as where a library keeps it compressed
    becomes: type[Prepared]
    if weight.dtype in (torch.bfloat16, torch.float16) and cpu_products(weight.dtype) is None:
        becomes = WidenedLinear if is_linear else WidenedConv2d
    elif is_linear or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    else:
        becomes = UnfoldedConv2d if weight.dtype == torch.float32 else PackedConv2d
    return _obstacle(module, device_type, shared=uses[id(weight)] > 1) or becomes


def _obstacle(module: Any, device_type: str, *, shared: bool) -> str | None:
    """Why a module cannot be prepared; None if it can."""
    weight = module.weight
    if isinstance(module, Prepared):
        return "it is prepared"
    if shared:
        return "another module has the same weight"
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return "it is another convolution than nn.Conv2d"
    if type(module) not in (nn.Conv2d, nn.Linear) or not runs_alone(module):
        return "it is more than a convolution or a linear layer"
    if not weight.numel():
        return "its weight is empty"
    if not has_onednn or not torch.backends.mkldnn.enabled:
        return "PyTorch has no oneDNN here"
    if weight.device.type != device_type or type(weight) is not nn.Parameter or weight.is_inference():
        return f"its weight is on {weight.device}, or of another class than nn.Parameter"
    return _obstacle_of_convolution(module) if isinstance(module, nn.Conv2d) else None


def _obstacle_of_convolution(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return "it has groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "its border is not a number of zeros"
    orders = [torch.contiguous_format]
    if conv.weight.dtype != torch.float32:  # in which the weight multiplies as it is
        orders.append(torch.channels_last)
    if not any(conv.weight.is_contiguous(memory_format=order) for order in orders):
        return "its weight is in channels_last, or a view of another tensor"
    return None
