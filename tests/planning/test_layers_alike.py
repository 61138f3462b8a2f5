"""Layers of one shape at other resolutions."""

from __future__ import annotations

from slicemod.call import AttentionShape
from slicemod.planning.layers_alike import LayersAlike


def test_cross_attention_keeps_its_keys_at_every_resolution() -> None:
    call = LayersAlike(AttentionShape(1, 8, 4096, 77, 40, 2), 5, 512)
    assert call.at_resolution(1024).shape == AttentionShape(1, 8, 16384, 77, 40, 2)


def test_self_attention_has_as_many_keys_as_queries_at_every_resolution() -> None:
    call = LayersAlike(AttentionShape(1, 8, 1024, 1024, 80, 2), 5, 512)
    assert call.is_self_attention
    assert call.at_resolution(256) == LayersAlike(AttentionShape(1, 8, 256, 256, 80, 2), 5, 256)


def test_text_among_the_queries_does_not_grow_with_the_image() -> None:
    call = LayersAlike(AttentionShape(1, 24, 512 + 1024, 512 + 1024, 128, 2), 57, 512, text_tokens=512)
    assert call.at_resolution(1024).shape == AttentionShape(1, 24, 512 + 4096, 512 + 4096, 128, 2)
