"""What `slicemod.adapters.sgm` touches of Stability's sgm, which cannot be installed from a registry.

Written after sgm 0.1.0, `sgm/modules/attention.py` and `video_attention.py`: the same names, arguments and decisions,
among them that a BasicTransformerBlock turns every mode but `softmax` into `softmax` where xformers is missing.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

XFORMERS_IS_AVAILABLE = False


class CrossAttention(nn.Module):
    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        backend: Any = None,
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = query_dim if context_dim is None else context_dim
        self.scale = dim_head**-0.5
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        if additional_tokens is not None:
            x = torch.cat([additional_tokens, x], dim=1)
        context = x if context is None else context
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        if n_times_crossframe_attn_in_self:
            copies = x.shape[0] // n_times_crossframe_attn_in_self
            key, value = (
                repeat(part[::n_times_crossframe_attn_in_self], "b ... -> (b n) ...", n=copies) for part in (key, value)
            )
        query, key, value = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (query, key, value))
        output = rearrange(F.scaled_dot_product_attention(query, key, value, mask), "b h n d -> b n (h d)")
        if additional_tokens is not None:
            output = output[:, additional_tokens.shape[1] :]
        projected: Tensor = self.to_out(output)
        return projected


class BasicTransformerBlock(nn.Module):
    ATTENTION_MODES: dict[str, Any] = {"softmax": CrossAttention}

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
        attn_mode: str = "softmax",
        sdp_backend: Any = None,
    ) -> None:
        super().__init__()
        assert attn_mode in self.ATTENTION_MODES
        if attn_mode != "softmax" and not XFORMERS_IS_AVAILABLE:
            attn_mode = "softmax"
        made = self.ATTENTION_MODES[attn_mode]
        sizes = {"query_dim": dim, "heads": n_heads, "dim_head": d_head, "dropout": dropout, "backend": sdp_backend}
        self.attn1 = made(**sizes, context_dim=context_dim if disable_self_attn else None)
        self.attn2 = made(**sizes, context_dim=context_dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        output: Tensor = self.attn2(self.norm2(x), context=context) + x
        return output


class BasicTransformerSingleLayerBlock(nn.Module):
    ATTENTION_MODES: dict[str, Any] = {"softmax": CrossAttention}

    def __init__(self, dim: int, n_heads: int, d_head: int, attn_mode: str = "softmax") -> None:
        super().__init__()
        assert attn_mode in self.ATTENTION_MODES
        self.attn1 = self.ATTENTION_MODES[attn_mode](query_dim=dim, heads=n_heads, dim_head=d_head)


class VideoTransformerBlock(nn.Module):
    ATTENTION_MODES: dict[str, Any] = {"softmax": CrossAttention}

    def __init__(self, dim: int, n_heads: int, d_head: int, attn_mode: str = "softmax") -> None:
        super().__init__()
        self.attn1 = self.ATTENTION_MODES[attn_mode](query_dim=dim, heads=n_heads, dim_head=d_head)


def import_adapter(monkeypatch: pytest.MonkeyPatch, *, video: bool = True) -> Any:
    """`slicemod.adapters.sgm`, imported where `sgm.modules.attention` has the classes above, for one test."""
    contents: dict[str, list[type]] = {
        "sgm": [],
        "sgm.modules": [],
        "sgm.modules.attention": [CrossAttention, BasicTransformerBlock, BasicTransformerSingleLayerBlock],
    }
    if video:
        contents["sgm.modules.video_attention"] = [VideoTransformerBlock]
    for name, classes in contents.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        for each in classes:
            fresh = each
            if hasattr(each, "ATTENTION_MODES"):
                fresh = type(each.__name__, (each,), {"ATTENTION_MODES": dict(each.ATTENTION_MODES)})
            setattr(module, each.__name__, fresh)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    adapter = "slicemod.adapters.sgm"
    monkeypatch.setitem(sys.modules, adapter, ModuleType(adapter))  # noted, so that it is gone after the test
    del sys.modules[adapter]
    return importlib.import_module(adapter)
