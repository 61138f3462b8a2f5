"""Stability sgm: importing this module makes `softmax-sliced` a `spatial_transformer_attn_type` of its UNets.

    network_config:
      target: sgm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        spatial_transformer_attn_type: softmax-sliced

`register` makes more names, for other settings. For models that are already built, use `slicemod.swap_attention`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from slicemod.attention import MemoryAwareCrossAttention
from slicemod.config import SliceConfig

try:
    from sgm.modules import attention as sgm_attention
except ModuleNotFoundError as error:
    if error.name not in ("sgm", "sgm.modules"):
        raise
    raise ModuleNotFoundError(
        "slicemod.adapters.sgm: expected Stability's package sgm; it is not installed. Install it with "
        "`pip install git+https://github.com/Stability-AI/generative-models`.",
        name=error.name,
    ) from error

MODE = "softmax-sliced"


class SlicedCrossAttention(MemoryAwareCrossAttention):
    """`MemoryAwareCrossAttention` with the constructor of sgm's CrossAttention.

    Args:
        query_dim: channels of the input and the output.
        context_dim: channels of the context; `query_dim` when left out.
        heads: number of heads.
        dim_head: size of a head.
        dropout: probability of dropping an output channel after the last projection.
        backend: has to be None. It is sgm's `sdp_backend`; here the plan chooses the kernel.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    Raises:
        ValueError: `backend` is given, or a field of `slicing` has none of its accepted values.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        backend: object = None,
        *,
        slicing: SliceConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if backend is not None:
            raise ValueError(
                f"sdp_backend: expected None where attention is sliced; got {backend!r}. Leave it out: the plan "
                "chooses the kernel, and the kernel of a SliceConfig pins it."
            )
        super().__init__(query_dim, context_dim, heads, dim_head, dropout, slicing=slicing)


def register(mode: str = MODE, slicing: SliceConfig | Mapping[str, Any] | None = None) -> None:
    """Make `mode` a name that sgm's transformer blocks accept, as they accept `softmax`.

    Args:
        mode: a name of your own, for `spatial_transformer_attn_type`.
        slicing: a `SliceConfig`, a dict of its fields, or None for the default one.

    Raises:
        ValueError: the name is one of sgm's own, or a field of `slicing` has a value that is not accepted.
    """
    made = functools.partial(SlicedCrossAttention, slicing=SliceConfig.of(slicing))
    for block in _blocks():
        taken = block.ATTENTION_MODES.get(mode)
        if taken is not None and not _is_ours(taken):
            raise ValueError(f"mode: expected a name that sgm does not use; got {mode!r}. Choose another one.")
        block.ATTENTION_MODES[mode] = made


def _blocks() -> list[Any]:
    """The classes of sgm that look up attention modes."""
    blocks = [sgm_attention.BasicTransformerBlock, sgm_attention.BasicTransformerSingleLayerBlock]
    if find_spec("sgm.modules.video_attention"):  # since the video models
        from sgm.modules.video_attention import VideoTransformerBlock

        blocks.append(VideoTransformerBlock)
    return blocks


def _is_ours(made: Any) -> bool:
    return isinstance(made, functools.partial) and made.func is SlicedCrossAttention


def _keep_our_modes(block: Any) -> None:
    """Make a BasicTransformerBlock keep our modes if xformers is not installed.

    Its `__init__` believes that every mode other than `softmax` needs xformers, and replaces it by `softmax` without
    them.
    """
    original = block.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        made = block.ATTENTION_MODES.get(call.arguments.get("attn_mode"))
        if not _is_ours(made):
            original(self, *args, **kwargs)
            return
        vars(self)["ATTENTION_MODES"] = {"softmax": made}
        call.arguments["attn_mode"] = "softmax"
        original(*call.args, **call.kwargs)
        del vars(self)["ATTENTION_MODES"]

    block.__init__ = init


_keep_our_modes(sgm_attention.BasicTransformerBlock)
register()
