"""Convolutions with their weights in oneDNN's own layout.

PyTorch keeps the weights of a convolution as `(out, in, height, width)`. oneDNN multiplies by them in blocks of
channels, so each call first copies them into such blocks. In the small images at the bottom of a UNet this copy takes
longer than the convolution. Here the weights are kept in blocks from the start, and only there.

This is for bfloat16. In float32 oneDNN's convolution by packed weights may sum all channels in one number: with
AVX-512, its rounding error is up to five times that of PyTorch's.

Whatever needs the weights as they were gets them: a state dict, a copy and a pickle hold plain weights, and moving or
converting a module makes it plain again. Code that writes to packed weights gets an error from PyTorch, never a
convolution by weights that were changed elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slicemod.call import needs_grad
from slicemod.layers.plain_module import has_own
from slicemod.on_cpu.convolution import PreparedConv2d
from slicemod.torch_internals import pack_convolution, packed_convolution

# For the channels of UNets the blocks do not depend on the size of the image, but oneDNN wants to know one. Where they
# do, a call copies the weight as for a plain convolution.
_PIXELS = 16


class PackedConv2d(PreparedConv2d):
    """A convolution in bfloat16 whose weight is packed.

    Its `scratch_bytes` are those of a plain one, which copies the weight too: more than are taken.
    """

    way = "weights packed"

    _plain: nn.Parameter  # the weight's own parameter, which has no numbers meanwhile
    _strides: tuple[int, ...]  # its strides

    def takes(self, given: Tensor) -> bool:
        """The call is no more than an inference by the packed weight. Others may have put a plain one in its place."""
        return super().takes(given) and self._is_packed()

    def compute(self, given: Tensor) -> Tensor:
        """`(B, O, h, w)` of `(B, C, H, W)`. The output is laid out as `(B, h, w, O)`."""
        sizes = self.padding, self.stride, self.dilation, self.groups
        output: Tensor = packed_convolution(given, self.weight, self.bias, *sizes, "none", [], None)
        return output

    def compute_plainly(self, given: Tensor) -> Tensor:
        """The output for any other input, by a plain copy of the weight.

        Raises:
            RuntimeError: a gradient is needed, a graph is traced by `torch.compile`, or some program has put its own
                `forward` into `nn.Conv2d`, which looks for plain weights.
        """
        if not self._is_packed():
            return super().compute_plainly(given)
        if torch.compiler.is_compiling():
            reason = "a traced graph"
        elif needs_grad(given, self.weight, self.bias):
            reason = "a call that needs gradients"
        elif not has_own(nn.Conv2d, "forward"):
            reason = "another forward in nn.Conv2d, which some program put there"
        else:
            output: Tensor = self._conv_forward(given, self._numbers(), self.bias)
            return output
        raise RuntimeError(
            f"packed convolutions: expected inference (torch.no_grad()) without torch.compile; got {reason}. Call "
            "undo() of what prepare_for_cpu returned first."
        )

    @torch.inference_mode(False)  # otherwise what it makes could not be trained afterwards
    def prepare(self) -> None:
        """Pack the weight."""
        weight = self.weight
        sizes = self.padding, self.stride, self.dilation, self.groups
        packed = pack_convolution(weight.detach(), *sizes, [1, self.in_channels, _PIXELS, _PIXELS])
        vars(self).update(_plain=weight, _strides=weight.stride())
        weight.data = weight.new_empty(0)
        self.weight = nn.Parameter(packed, requires_grad=weight.requires_grad)

    @torch.inference_mode(False)  # otherwise the parameter could not be trained afterwards
    def make_plain(self) -> None:
        """Become a plain convolution again, with the very same parameter."""
        state, is_packed = vars(self), self._is_packed()
        weight, strides = state.pop("_plain", None), state.pop("_strides", None)
        if is_packed:
            packed = self.weight
            numbers = torch.empty_strided(packed.shape, strides, dtype=packed.dtype, device="cpu")
            weight.data = numbers.copy_(self._numbers())
            self.weight = weight.requires_grad_(packed.requires_grad)
        super().make_plain()

    def plain_state(self) -> dict[str, Any]:
        """The attributes of a plain convolution; its weight is a copy."""
        state = {name: value for name, value in vars(self).items() if name not in ("_plain", "_strides")}
        if not self._is_packed():
            return state
        weight = nn.Parameter(self._numbers(), requires_grad=self.weight.requires_grad)
        return state | {"_parameters": state["_parameters"] | {"weight": weight}}

    def _is_packed(self) -> bool:
        """The weight is the packed one: packing has not failed, and nobody has put another in its place."""
        if torch.compiler.is_compiling():  # that of PyTorch 2.9 does not see what is packed
            return getattr(self, "_strides", None) is not None
        weight = self._parameters.get("weight")
        return weight is not None and weight.is_mkldnn

    def _numbers(self) -> Tensor:
        """The weight as a plain tensor."""
        return self.weight.detach().to_dense()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_packed():
            destination[f"{prefix}weight"] = self._numbers()

    def _load_from_state_dict(self, *given: Any, **more: Any) -> None:
        self.make_plain()
        self._load_from_state_dict(*given, **more)  # nn.Conv2d's
