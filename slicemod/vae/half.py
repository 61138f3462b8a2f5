"""`StripwiseHalf`: an encoder or decoder of a VAE that computes its layers a strip of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slicemod.call import needs_grad
from slicemod.config import SETTINGS, SliceConfig
from slicemod.graph_operators import refused
from slicemod.plan import NotEnoughMemoryError
from slicemod.vae.layers import Layer
from slicemod.vae.operators import run_in_graph
from slicemod.vae.plan import StripPlan, output_shape
from slicemod.vae.running import planned, run, sizes
from slicemod.watched import PlainValues, constant_in_graph, plain_values


class StripwiseHalf(nn.Module):
    """In the place of an encoder or a decoder, with its parts.

    Where gradients are needed, the code of the original runs, with these parts. The attribute `plan` is the plan of
    the last eager call; None if that call needed gradients.

    Args:
        describe: takes this module, and returns its layers in order.
        whole: the original's `forward` as a function of this module and the image.
        slicing: its budget is what a strip may take beside the input and the output of its layer.
    """

    def __init__(
        self,
        describe: Callable[[Any], Sequence[Layer]],
        whole: Callable[..., Tensor],
        slicing: SliceConfig,
    ) -> None:
        super().__init__()
        self.describe = describe
        self.whole = whole
        self.slicing = slicing
        self.plan: StripPlan | None = None  # of the last eager call

    def forward(self, sample: Tensor, *more: Any, **others: Any) -> Tensor:
        """Compute the encoder or decoder.

        Args:
            sample: `(B, C, H, W)`: images to encode, or latents to decode.
            more: further arguments of the original, which have to be None.
            others: the same by name.

        Returns:
            What the original returns: `(B, C', H', W')`.

        Raises:
            NotEnoughMemoryError: not even a strip of one row fits the budget.
            ValueError: a part was changed after the swap, or another argument is given.
        """
        if needs_grad(sample, *self.parameters()):
            self.plan = None
            return self.whole(self, sample, *more, **others)
        if any(given is not None for given in (*more, *others.values())):
            raise ValueError(
                f"{type(self).__name__}: expected an image and nothing more; got {len(more) + len(others)} further "
                "arguments. Restore the VAE by restore_attention to pass them."
            )
        layers = self.describe(self)
        items, _, height, width = sample.shape
        call = (sizes(layers), (items, height, width), sample.dtype)
        if torch.compiler.is_dynamo_compiling():
            output = run_in_graph(layers, sample, self.slicing)
            if output is not None:
                return output
            # The compiler sees the strips one by one, and decides how many it holds at once.
            settings = plain_values(self.slicing, SETTINGS)
            found = _plan_in_graph(settings, str(sample.device), *call)
            if isinstance(found, str):
                *rows, columns = output_shape(call[0], items, height, width)
                nothing: Tensor = refused(sample.new_empty(*rows, 1), sample.new_empty(1, 1, 1, columns), found)
                return nothing
            return run(layers, sample, found)
        self.plan = planned(self.slicing, str(sample.device), *call)
        return run(layers, sample, self.plan)

    def extra_repr(self) -> str:
        """The budget and the last plan, in the module's `repr`."""
        return f"budget={self.slicing.budget!r}{'' if self.plan is None else f', plan: {self.plan}'}"


@constant_in_graph
def _plan_in_graph(settings: PlainValues, *call: Any) -> StripPlan | str:
    """The plan of a call, or the text that says why there is none; see `slicemod.functional`."""
    try:
        return planned(SliceConfig(*settings), *call)
    except NotEnoughMemoryError as error:
        return str(error)
