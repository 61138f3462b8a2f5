"""Heads are split and merged as einops would, without copies where a layer's layout allows it."""

from __future__ import annotations

import torch
from einops import rearrange

from slicemod.layers.heads import merge_heads, split_heads


def test_heads_are_split_as_views() -> None:
    tensor = torch.randn(2, 61, 33)
    split = split_heads(tensor, 3)
    assert torch.equal(split, rearrange(tensor, "b n (h d) -> b h n d", h=3))
    assert split.data_ptr() == tensor.data_ptr()


def test_heads_are_merged_as_a_view_where_they_lie_so() -> None:
    tensor = torch.randn(2, 61, 33)
    merged = merge_heads(split_heads(tensor, 3))
    assert torch.equal(merged, tensor)
    assert merged.data_ptr() == tensor.data_ptr()


def test_heads_that_lie_apart_are_merged_all_the_same() -> None:
    tensor = torch.randn(2, 3, 61, 11)
    assert torch.equal(merge_heads(tensor), rearrange(tensor, "b h n d -> b n (h d)"))


def test_no_tokens_have_heads_too() -> None:
    assert split_heads(torch.zeros(2, 0, 33), 3).shape == (2, 3, 0, 11)
    assert merge_heads(torch.zeros(2, 3, 0, 11)).shape == (2, 0, 33)
