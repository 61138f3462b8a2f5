"""Convolutions with their weights in oneDNN's own layout, for inference on CPUs.

PyTorch keeps the weights of a convolution as `(out, in, height, width)`. oneDNN multiplies by them in blocks of
channels, so each call first copies them into such blocks. In the small images at the bottom of a UNet this copy takes
longer than the convolution. Here the weights are kept in blocks from the start, and only there.

This is for bfloat16. In float32 oneDNN's convolution by packed weights sums all channels in one number: its rounding
error is up to five times that of PyTorch's.

Whatever needs the weights as they were gets them: a state dict, a copy and a pickle hold plain weights, and moving or
converting a module makes it plain again. Code that writes to packed weights gets an error from PyTorch, never a
convolution by weights that were changed elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slicemod.call import dtype_name, needs_grad
from slicemod.half_precision import cpu_products
from slicemod.layers.plain_module import runs_alone
from slicemod.torch_internals import has_onednn, is_any_autocast_enabled, pack_convolution, packed_convolution
from slicemod.vae.half import StripwiseHalf
from slicemod.watched import is_watched

# For the channels of UNets the blocks do not depend on the size of the image, but oneDNN wants to know one. Where they
# do, a call copies the weight as for a plain convolution.
_PIXELS = 16


class PackedConv2d(nn.Conv2d):
    """A convolution whose weight is packed. A plain one becomes so in place, and plain again."""

    _plain: nn.Parameter  # the weight's own parameter, which has no numbers meanwhile
    _strides: tuple[int, ...]  # its strides

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        """`(B, O, H', W')` of `(B, C, H, W)`. The output is laid out as `(B, H', W', O)`.

        Raises:
            RuntimeError: a gradient is needed, or a graph is traced by `torch.compile`.
        """
        weight = self.weight
        if torch.compiler.is_compiling() or needs_grad(input, weight, self.bias):
            raise RuntimeError(
                "packed convolutions: expected inference (torch.no_grad()) without torch.compile; got "
                f"{'a traced graph' if torch.compiler.is_compiling() else 'a call that needs gradients'}. Call undo() "
                "of what pack_convolutions returned first."
            )
        if is_watched(input) or is_any_autocast_enabled() or input.dtype != weight.dtype or self._is_changed(input):
            output: Tensor = self._conv_forward(input, self._numbers(), self.bias)
            return output
        sizes = self.padding, self.stride, self.dilation, self.groups
        return packed_convolution(input, weight, self.bias, *sizes, "none", [], None)  # type: ignore[no-any-return]

    def _is_changed(self, image: Tensor) -> bool:
        """The image has no batch, or others changed what is computed, as programs do whose pictures can be tiled."""
        return image.dim() != 4 or self.padding_mode != "zeros" or "_conv_forward" in vars(self)

    @torch.inference_mode(False)  # otherwise the parameter could not be trained afterwards
    def unpack(self) -> None:
        """Become a plain convolution again, with the very same parameter."""
        packed, weight = self.weight, self._plain
        numbers = torch.empty_strided(packed.shape, self._strides, dtype=packed.dtype, device="cpu")
        weight.data = numbers.copy_(self._numbers())
        self.weight = weight.requires_grad_(packed.requires_grad)
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        for name in ("_plain", "_strides"):
            vars(self).pop(name)

    def _numbers(self) -> Tensor:
        """The weight as a plain tensor."""
        return self.weight.detach().to_dense()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.unpack()
        return self._apply(fn, recurse)  # nn.Conv2d's

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._numbers()

    def _load_from_state_dict(self, *given: Any, **more: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*given, **more)  # nn.Conv2d's

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in ("_plain", "_strides")}
        weight = nn.Parameter(self._numbers(), requires_grad=self.weight.requires_grad)
        state["_parameters"] = state["_parameters"] | {"weight": weight}
        return object.__new__, (nn.Conv2d,), state


@dataclass(frozen=True)
class PackedConvolutions:
    """What `pack_convolutions` did. As a context manager it undoes it at the end.

    Attributes:
        names: the paths of the packed convolutions.
        skipped: path and reason of each convolution that stays as it is.
        weight_bytes: bytes of the packed weights. Channels that are no multiple of 16 are padded to one, beyond this.
        convolutions: the packed convolutions.
    """

    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    weight_bytes: int
    convolutions: tuple[nn.Conv2d, ...] = field(repr=False, compare=False)

    def __str__(self) -> str:
        reasons = Counter(reason for _, reason in self.skipped)
        lines = [f"packed {len(self.names)} convolutions, {self.weight_bytes / 2**20:.1f} MiB of weights"]
        return "\n".join(lines + [f"  skipped {count}: {reason}" for reason, count in reasons.items()])

    def undo(self) -> None:
        """Make the convolutions plain again, but for those that are so already. Their weights keep every bit."""
        _unpack(self.convolutions)

    def __enter__(self) -> PackedConvolutions:
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()


def pack_convolutions(model: nn.Module) -> PackedConvolutions:
    """Keep the weights of a model's convolutions as the CPU multiplies by them, for inference.

    This takes no more memory than the plain weights, beyond one weight at a time while it packs. Results differ by
    rounding, as they do between two layouts of an image.

    State dicts, copies and pickles hold plain weights. `model.to(...)` and loading a state dict make convolutions plain
    again. Gradients and `torch.compile` raise an error until `undo()`.

    Args:
        model: a UNet or another model whose weights are on the CPU, in bfloat16. It is changed in place.

    Returns:
        What was packed, and what was skipped and why. Its `undo()`, or the end of a `with` statement, undoes it.

    Raises:
        TypeError: the model is not a module.
        ValueError: it has no convolution that can be packed.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}. Pass the UNet itself.")
    if any(isinstance(module, StripwiseHalf) for module in model.modules()):
        raise ValueError(
            f"model: expected one without a VAE that computes in strips, as strips multiply by plain weights; got "
            f"{type(model).__name__} after swap_vae. Pass the UNet, or restore_attention(model) first."
        )
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    uses = Counter(id(given) for module in model.modules() for given in module.parameters(recurse=False))
    packed: dict[str, nn.Conv2d] = {}
    skipped = []
    try:
        for name, conv in found:
            reason = "another module has the same weight" if uses[id(conv.weight)] > 1 else _obstacle(conv)
            if reason is None:
                _pack(conv)
                packed[name] = conv
            else:
                skipped.append((name, reason))
    except BaseException:
        _unpack(packed.values())
        raise
    if not packed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise ValueError(
            f"model: expected convolutions that this CPU multiplies; {reasons or 'found none'} in "
            f"{type(model).__name__}. Pass a UNet in bfloat16 on the CPU."
        )
    size = sum(conv.weight.nbytes for conv in packed.values())
    return PackedConvolutions(tuple(packed), tuple(skipped), size, tuple(packed.values()))


@torch.inference_mode(False)  # otherwise what it makes could not be trained afterwards
def _pack(conv: nn.Conv2d) -> None:
    """Make a plain convolution a packed one in place."""
    weight = conv.weight
    sizes = conv.padding, conv.stride, conv.dilation, conv.groups
    packed = pack_convolution(weight.detach(), *sizes, [1, conv.in_channels, _PIXELS, _PIXELS])
    vars(conv).update(_plain=weight, _strides=weight.stride())
    weight.data = weight.new_empty(0)
    conv.weight = nn.Parameter(packed, requires_grad=weight.requires_grad)
    conv.__class__ = PackedConv2d


def _unpack(convolutions: Iterable[nn.Conv2d]) -> None:
    """Make those plain that are packed still."""
    for conv in convolutions:
        if isinstance(conv, PackedConv2d):
            conv.unpack()


def _obstacle(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be packed; None if it can."""
    weight = conv.weight
    if isinstance(conv, PackedConv2d):
        return "it is packed"
    if type(conv) is not nn.Conv2d or "forward" in vars(conv) or not runs_alone(conv):
        return "it is more than a convolution"
    if conv.groups != 1:
        return "it has groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "its border is not a number of zeros"
    if not has_onednn or not torch.backends.mkldnn.enabled:
        return "PyTorch has no oneDNN here"
    if not weight.is_cpu or type(weight) is not nn.Parameter or weight.is_inference():
        return f"its weight is on {weight.device}, or of another class than nn.Parameter"
    if not any(weight.is_contiguous(memory_format=order) for order in (torch.contiguous_format, torch.channels_last)):
        return "its weight is a view of another tensor"
    if weight.dtype != torch.bfloat16:
        return f"it computes in {dtype_name(weight.dtype)}; packed weights are as exact and faster in bfloat16 alone"
    if cpu_products(weight.dtype) is None:
        return "this CPU does not multiply bfloat16"
    return None
