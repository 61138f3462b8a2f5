"""What oneDNN's products of half precision allocate inside PyTorch's CPU flash attention: read off torch 2.14.

The backward pass multiplies transposed blocks, which oneDNN packs into a scratchpad. Where products run on the tiles of
AMX, the forward pass packs keys and values as a whole. CPUs without instructions for a dtype take another route and
allocate nothing.
"""

import os
from typing import Literal

import torch

# How a CPU multiplies half precision: bfloat16 by AVX512-BF16, by AMX, or in float32 by AVX-512 that has neither;
# float16 by AVX512-FP16.
Products = Literal["bfloat16", "tiles", "widened", "float16"]

_LEAST_PACKED_TOKENS = 64  # fewer queries or keys are not packed for the tiles
_KEYS_PACKED_AT_ONCE = 512

_KEY_BLOCK, _COLUMN_BLOCK = 256, 64
_PER_THREAD, _PER_CALL = 640, 512


def onednn_limit() -> str:
    """The instructions that the user has oneDNN stop at, as its variable spells them; empty where there is no limit."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return "" if limit.upper() in ("ALL", "DEFAULT") else limit.upper()


def bfloat16_products() -> Products:
    """How oneDNN multiplies bfloat16 on this CPU, which has AVX-512 at least."""
    limit = onednn_limit()
    if torch.cpu._is_amx_tile_supported() and (not limit or "AMX" in limit):
        return "tiles"
    has_instructions = torch.cpu._is_avx512_bf16_supported() and limit not in ("AVX512_CORE", "AVX512_CORE_VNNI")
    return "bfloat16" if has_instructions else "widened"


def flash_scratch_bytes(rows: int, keys: int, head_dim: int, threads: int, products: Products = "bfloat16") -> int:
    """Bytes of the backward pass for blocks of `rows` queries by `keys` keys.

    To the byte for bfloat16 by AVX512-BF16 or in float32, at its most for the others.

    >>> flash_scratch_bytes(256, 512, 64, threads=1)
    230532
    """
    if products == "float16":
        block = 4 * rows * keys + _round_up(head_dim, 16) * (rows + keys) + 41 * keys
        return block + threads * (256 * _round_up(max(keys, rows), 64) + 1824) + 4
    if products == "widened":
        return threads * (4 * _round_up(max(keys, rows) * head_dim, 64) + 128) + 4  # a product in float32, a counter
    columns = min(_round_up(head_dim, 16), _COLUMN_BLOCK)
    split = threads if head_dim <= _COLUMN_BLOCK else 1  # wide heads may be split by columns instead
    block = min(-(-keys // split), _KEY_BLOCK)
    transposed_keys = threads * (2 * rows * (block + columns) + 4 * block * columns + _PER_THREAD) + _PER_CALL
    transposed_rows = 4 * rows * min(head_dim, _COLUMN_BLOCK) + threads * (128 * _round_up(keys, 32) + 1024)
    return max(transposed_keys, transposed_rows) + 4  # and a counter


def packed_bytes(heads: int, queries: int, keys: int, head_dim: int, threads: int, rows: int) -> int:
    """Bytes of the forward pass on the tiles of AMX: keys and values of all `heads`, and in a thread a block of
    either, beside its blocks of `rows` queries.

    >>> packed_bytes(heads=8, queries=1024, keys=77, head_dim=40, threads=1, rows=256)
    105872
    """
    if min(queries, keys) < _LEAST_PACKED_TOKENS:
        return 0
    even_dim, even_keys = _round_up(head_dim, 2), _round_up(keys, 2)
    padding = 2 * rows * (even_keys - keys) if keys < _KEYS_PACKED_AT_ONCE else 0
    transposed = 64 * even_dim if head_dim % 2 else 0
    in_thread = 2 * min(keys, _KEYS_PACKED_AT_ONCE) * head_dim + transposed + padding
    return 2 * heads * (keys * even_dim + even_keys * head_dim) + threads * in_thread


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
