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
from slicemod.on_cpu.prepared import Prepared, is_only_inference, is_other_convolution
from slicemod.torch_internals import pack_convolution, packed_convolution

# For the channels of UNets the blocks do not depend on the size of the image, but oneDNN wants to know one. Where they
# do, a call copies the weight as for a plain convolution.
_PIXELS = 16


class PackedConv2d(Prepared, nn.Conv2d):
    """A convolution in bfloat16 whose weight is packed."""

    plain, way = nn.Conv2d, "weights packed"

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
                "of what prepare_for_cpu returned first."
            )
        if is_other_convolution(self, input) or not is_only_inference(self, input):
            output: Tensor = self._conv_forward(input, self._numbers(), self.bias)
            return output
        sizes = self.padding, self.stride, self.dilation, self.groups
        return packed_convolution(input, weight, self.bias, *sizes, "none", [], None)  # type: ignore[no-any-return]

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
        state = vars(self)
        if "_plain" in state:  # otherwise packing has failed
            packed, weight = self.weight, state.pop("_plain")
            numbers = torch.empty_strided(packed.shape, state.pop("_strides"), dtype=packed.dtype, device="cpu")
            weight.data = numbers.copy_(self._numbers())
            self.weight = weight.requires_grad_(packed.requires_grad)
        super().make_plain()

    def plain_state(self) -> dict[str, Any]:
        """The attributes of a plain convolution; its weight is a copy."""
        state = {name: value for name, value in vars(self).items() if name not in ("_plain", "_strides")}
        weight = nn.Parameter(self._numbers(), requires_grad=self.weight.requires_grad)
        return state | {"_parameters": state["_parameters"] | {"weight": weight}}

    def _numbers(self) -> Tensor:
        """The weight as a plain tensor."""
        return self.weight.detach().to_dense()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._numbers()

    def _load_from_state_dict(self, *given: Any, **more: Any) -> None:
        self.make_plain()
        self._load_from_state_dict(*given, **more)  # nn.Conv2d's
