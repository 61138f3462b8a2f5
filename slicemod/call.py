"""One attention call in plain values: everything that its kernel and its plan depend on, without the tensors.

`AttentionShape` holds the sizes. `CallSpec` adds where and how the call runs. Functions that a compiler can trace make
both from tensors. To plan ahead, both can also be made for a call that never happens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from slicemod.card import ASSUMED_CARD, Card, card_of
from slicemod.watched import PlainValues

# On these devices the sliced kernel computes half precision in float32 tiles, because SDPA's kernels have their scores
# in float32 there. bfloat16 has 8 significant bits: a large score, rounded to it, may change its weight by whole
# percents. On other devices `SliceConfig.upcast` decides.
_UPCASTING_DEVICES = ("cpu", "cuda")

_ROW_ALIGNMENT = 8  # elements; PyTorch's CUDA kernels want the rows of a mask to start at multiples of them

_DTYPE_OF_SIZE = {2: torch.float16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class MaskShape:
    """Sizes of an attention mask before broadcasting: each is 1, or the size of the scores.

    Attributes:
        is_bool: the mask is bool. Like a mask with another dtype than the query, it is converted: by the sliced kernel
            one slice at a time, by a fused kernel as a whole.
        has_grad: the mask gets a gradient, summed over the dimensions that it is broadcast along.
        other_dtype: its dtype differs from the query's.
        unaligned: its rows do not start at multiples of 8 elements, or its last dimension is not contiguous.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    is_bool: bool = False
    has_grad: bool = False
    other_dtype: bool = False
    unaligned: bool = False

    @property
    def elements(self) -> int:
        """Elements of the whole mask."""
        return self.batch * self.heads * self.queries * self.keys


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call.

    Args:
        batch: batch items `B`.
        heads: query heads `H`.
        queries: query tokens `N`.
        keys: key tokens `M`.
        head_dim: size `D` of one head's queries and keys.
        itemsize: bytes per element of query, key and value.
        value_dim: size `Dv` of one head's values; `head_dim` when left out.
        key_heads: heads of key and value, a divisor of `heads` (grouped-query attention); `heads` when left out.
        upcast: scores are computed in float32 if `itemsize` is smaller than 4.
        causal: a query sees the keys up to its own position.
        dropout: attention weights are dropped; a slice then needs a tile for its random factors.
        irregular: key or value have strides that a matrix product cannot read, so each slice copies them first.
        mask: sizes of the attention mask; None without one.

    Raises:
        ValueError: a size is negative, `itemsize` is not 2, 4 or 8, or `heads` is not a multiple of `key_heads`.

    >>> AttentionShape(1, 8, 4096, 4096, 40, 2).scores_bytes
    268435456
    """

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    itemsize: int
    value_dim: int | None = None
    key_heads: int | None = None
    upcast: bool = False
    causal: bool = False
    dropout: bool = False
    irregular: bool = False
    mask: MaskShape | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "queries", "keys", "head_dim"):
            size = getattr(self, name)
            if size < 0:
                raise ValueError(f"AttentionShape: {name} must be 0 or more, got {size}. Pass the tensor's size.")
        if self.itemsize not in (2, 4, 8):
            raise ValueError(
                f"AttentionShape: itemsize must be 2, 4 or 8 bytes (half, single, double), got {self.itemsize}. "
                "Pass tensor.element_size() of a floating-point tensor."
            )
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise ValueError(
                f"AttentionShape: heads must be a multiple of key_heads, got heads={self.heads} and "
                f"key_heads={self.key_heads}. Repeat the key heads so that they divide the query heads."
            )

    def __str__(self) -> str:
        heads = f"{self.heads} heads" if self.group == 1 else f"{self.heads} heads on {self.key_heads}"
        sizes = f"{self.batch} x {heads}, {self.queries} queries by {self.keys} keys of {self.head_dim} channels"
        return f"{sizes}, {self.itemsize} bytes each{', in float32' if self.score_itemsize > self.itemsize else ''}"

    @property
    def score_itemsize(self) -> int:
        """Bytes per element of the scores."""
        return max(self.itemsize, 4) if self.upcast else self.itemsize

    @property
    def values(self) -> int:
        """Size `Dv` of one head's values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return 1 if self.key_heads is None else self.heads // self.key_heads

    @property
    def batch_heads(self) -> int:
        """`B * H`."""
        return self.batch * self.heads

    @property
    def scores_bytes(self) -> int:
        """Bytes of the full score matrix, `B*H * N * M * e`."""
        return self.batch_heads * self.queries * self.keys * self.score_itemsize

    def at_side(self, side: int) -> AttentionShape:
        """The same attention for a square image of `side` pixels, with one query for each 8 by 8 pixels.

        In self-attention the keys change with the queries. The keys of a context, such as a text, stay as they are.
        """
        return self.with_queries((side // 8) ** 2)

    def with_queries(self, queries: int) -> AttentionShape:
        """The same attention with another number of queries, and of keys where these are the same tokens."""
        keys = queries if self.keys == self.queries else self.keys
        mask = self.mask
        if mask is not None:
            mask = replace(mask, queries=queries if mask.queries > 1 else 1, keys=keys if mask.keys > 1 else 1)
        return replace(self, queries=queries, keys=keys, mask=mask)


class Layout(NamedTuple):
    """What PyTorch's fused kernels want to know of the caller's tensors, besides their sizes.

    Attributes:
        dims: number of dimensions of the query.
        mask_dims: number of dimensions of the mask; 0 without one.
        contiguous: the last dimensions of query, key and value are contiguous.
        same_batch: query, key and value have the same batch.
        same_heads: they have the same number of heads, or `enable_gqa` is set.
        mask_requires_grad: the mask requires a gradient, even if gradients are disabled now.
        only_mask_requires_grad: the mask does, and query, key and value do not.
        merged: the query lies as `(B, N, H, D)` in memory.
        runs: on CUDA, which of PyTorch's kernels take the call (`cuda_bytes.CUDA_KERNELS`), as PyTorch says; None if
            PyTorch was not asked.
        choice: on CUDA, the value of the `SDPBackend` that PyTorch would run now; None if PyTorch was not asked.
    """

    dims: int = 4
    mask_dims: int = 0
    contiguous: bool = True
    same_batch: bool = True
    same_heads: bool = True
    mask_requires_grad: bool = False
    only_mask_requires_grad: bool = False
    merged: bool = True
    runs: tuple[str, ...] | None = None
    choice: int | None = None


A_LAYERS_LAYOUT = Layout()


@dataclass(frozen=True)
class CallSpec:
    """One attention call, without its tensors.

    Attributes:
        shape: its sizes.
        dtype: the dtype of query, key and value.
        device: where it runs.
        training: gradients will be needed.
        ordinary_scale: the factor of the scores is an ordinary number, see `has_ordinary_scale`.
        layout: how the caller's tensors are laid out.
        transformed: a function of `torch.func` transforms the call. It takes no operators but PyTorch's own.
        threads: PyTorch's threads on the CPU.
        card: the GPU, on CUDA.
        deterministic: PyTorch has to compute the same bits each time (`torch.use_deterministic_algorithms`).
    """

    shape: AttentionShape
    dtype: torch.dtype
    device: torch.device
    training: bool = False
    ordinary_scale: bool = True
    layout: Layout = A_LAYERS_LAYOUT
    transformed: bool = False
    threads: int = 1
    card: Card = ASSUMED_CARD
    deterministic: bool = False

    @classmethod
    def planned(
        cls,
        shape: AttentionShape,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        *,
        training: bool = False,
    ) -> CallSpec:
        """A call to plan for, which never happens: laid out as a layer's tensors are, with this machine's threads.

        Args:
            shape: its sizes.
            device: where it would run. This machine need not have it.
            dtype: float16, float32 or float64, following `shape.itemsize`, when left out.
            training: gradients would be needed.
        """
        device = torch.device(device)
        dtype = _DTYPE_OF_SIZE[shape.itemsize] if dtype is None else dtype
        layout = A_LAYERS_LAYOUT if shape.mask is None else Layout(mask_dims=4, mask_requires_grad=shape.mask.has_grad)
        threads = torch.get_num_threads()
        card, deterministic = card_of(device), must_be_deterministic()
        return cls(
            shape, dtype, device, training, layout=layout, threads=threads, card=card, deterministic=deterministic
        )


def dtype_name(dtype: torch.dtype) -> str:
    """As a user writes it.

    >>> dtype_name(torch.float16)
    'float16'
    """
    return str(dtype).removeprefix("torch.")


def must_be_deterministic() -> bool:
    """`torch.use_deterministic_algorithms` asks for the same bits each time, and not only for a warning."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def attention_sizes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    upcast: bool,
) -> PlainValues:
    """The arguments of `AttentionShape` for query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)`.

    They are plain ints and bools, also while a graph is traced. A symbolic size becomes a constant of the graph then,
    because the number of slices depends on it. A mask, which has to be 4-D, becomes the arguments of `MaskShape`.
    """
    return (
        *(index(size) for size in query.shape[:3]),
        index(key.shape[2]),
        index(query.shape[3]),
        query.element_size(),
        index(value.shape[3]),
        index(key.shape[1]),
        upcast,
        is_causal,
        constant_bool(dropout_p > 0),
        not (_product_reads(key) and _product_reads(value)),
        None if mask is None else _mask_sizes(mask, query),
    )


def constant_bool(condition: bool) -> bool:
    """The condition as a plain bool. While a graph is traced, the branch below makes it a constant of the graph."""
    return True if condition else False  # noqa: SIM210 - bool() of a symbolic condition stays symbolic


def _mask_sizes(mask: Tensor, query: Tensor) -> PlainValues:
    has_grad = mask.requires_grad and torch.is_grad_enabled()
    *steps, last = mask.stride()
    unaligned = last != 1 or any(step % _ROW_ALIGNMENT != 0 for step in steps)
    sizes = (index(size) for size in mask.shape)
    return (*sizes, mask.dtype == torch.bool, has_grad, mask.dtype != query.dtype, constant_bool(unaligned))


@lru_cache(maxsize=4096)
def attention_shape(sizes: PlainValues) -> AttentionShape:
    """The `AttentionShape` that `attention_sizes` described."""
    *plain, mask = sizes
    return replace(AttentionShape(*plain), mask=None if mask is None else MaskShape(*mask))


def _product_reads(matrices: Tensor) -> bool:
    """A matrix product reads these strides without a copy: rows or columns are contiguous."""
    rows, columns = matrices.stride()[-2:]
    return (columns == 1 and rows >= matrices.shape[-1]) or (rows == 1 and columns >= matrices.shape[-2])


def upcasts(device_type: str, itemsize: int) -> bool:
    """Whether the sliced kernel computes in float32 on this type of device, even without `SliceConfig.upcast`."""
    return device_type in _UPCASTING_DEVICES and itemsize < 4


def needs_grad(*tensors: Tensor | None) -> bool:
    """Gradients are enabled, and one of the tensors requires a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# Between these limits float32 holds the scale, and the numbers that a kernel computes from it, with all its digits.
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100


def has_ordinary_scale(scale: float | None) -> bool:
    """Whether a scale is positive, and neither zero nor infinite in float32. None stands for `1 / sqrt(D)`.

    With a positive scale, the largest product of a row is also its largest score. The native kernel relies on this.
    """
    return scale is None or LEAST_SCALE <= scale <= MOST_SCALE


def scale_of(query: Tensor, scale: float | None) -> float:
    """The factor of the scores: `scale`, or `1 / sqrt(D)` if it is None."""
    return 1 / math.sqrt(max(query.shape[3], 1)) if scale is None else scale
