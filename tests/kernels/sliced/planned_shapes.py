"""What plans are made for: sizes, budgets and devices to draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from slicemod.call import AttentionShape, MaskShape


@st.composite
def shapes(draw: st.DrawFn) -> AttentionShape:
    heads = draw(st.integers(1, 12))
    queries, keys = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    mask = MaskShape(
        1, draw(st.sampled_from([1, heads])), draw(st.sampled_from([1, queries])), keys, draw(st.booleans())
    )
    return AttentionShape(
        draw(st.integers(1, 3)),
        heads,
        queries,
        keys,
        draw(st.integers(1, 160)),
        draw(st.sampled_from([2, 4, 8])),
        key_heads=draw(st.sampled_from([divisor for divisor in range(1, heads + 1) if heads % divisor == 0])),
        upcast=draw(st.booleans()),
        causal=draw(st.booleans()),
        dropout=draw(st.booleans()),
        mask=draw(st.sampled_from([None, mask])),
    )


devices = st.sampled_from(["cuda", "cpu", "mps", "xpu"])


budgets = st.integers(0, 48).map(lambda power: 3**power // 2)
