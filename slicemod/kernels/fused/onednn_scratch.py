"""The bytes that oneDNN allocates for products of half precision inside of PyTorch's CPU flash attention.

They were read off the allocations of torch 2.14; `tests/test_memory_promise.py` compares. The backward pass multiplies
transposed blocks, which oneDNN packs into a scratchpad. With AMX the forward pass packs all keys and values. CPUs
without instructions for a dtype take another route, and allocate nothing.
"""

from slicemod.half_precision import Products
from slicemod.rounding import ceil_div, round_up

_LEAST_PACKED_TOKENS = 64  # fewer queries or keys are not packed for the tiles
_KEYS_PACKED_AT_ONCE = 512

_KEY_BLOCK, _COLUMN_BLOCK = 256, 64
_PER_THREAD, _PER_CALL = 640, 512


def flash_scratch_bytes(rows: int, keys: int, head_dim: int, threads: int, products: Products = "bfloat16") -> int:
    """Bytes of the backward pass for blocks of `rows` queries by `keys` keys.

    They are exact for bfloat16 by AVX512-BF16 and in float32, and an upper limit for the others.

    >>> flash_scratch_bytes(256, 512, 64, threads=1)
    230532
    """
    if products == "float16":
        block = 4 * rows * keys + round_up(head_dim, 16) * (rows + keys) + 41 * keys
        return block + threads * (256 * round_up(max(keys, rows), 64) + 1824) + 4
    if products == "widened":
        return threads * (4 * round_up(max(keys, rows) * head_dim, 64) + 128) + 4  # a product in float32, a counter
    columns = min(round_up(head_dim, 16), _COLUMN_BLOCK)
    split = threads if head_dim <= _COLUMN_BLOCK else 1  # wide heads may be split by columns instead
    block = min(ceil_div(keys, split), _KEY_BLOCK)
    transposed_keys = threads * (2 * rows * (block + columns) + 4 * block * columns + _PER_THREAD) + _PER_CALL
    transposed_rows = 4 * rows * min(head_dim, _COLUMN_BLOCK) + threads * (128 * round_up(keys, 32) + 1024)
    return max(transposed_keys, transposed_rows) + 4  # and a counter


def packed_bytes(heads: int, queries: int, keys: int, head_dim: int, threads: int, rows: int) -> int:
    """Bytes that the forward pass packs with AMX: keys and values of all `heads`, and in each thread one block of each.

    Args:
        heads: key heads of all batch items.
        queries: queries of a head.
        keys: keys of a head.
        head_dim: channels of a head.
        threads: PyTorch's threads.
        rows: queries of a block of PyTorch's kernel.

    >>> packed_bytes(heads=8, queries=1024, keys=77, head_dim=40, threads=1, rows=256)
    105872
    """
    if min(queries, keys) < _LEAST_PACKED_TOKENS:
        return 0
    even_dim, even_keys = round_up(head_dim, 2), round_up(keys, 2)
    padding = 2 * rows * (even_keys - keys) if keys < _KEYS_PACKED_AT_ONCE else 0
    transposed = 64 * even_dim if head_dim % 2 else 0
    in_thread = 2 * min(keys, _KEYS_PACKED_AT_ONCE) * head_dim + transposed + padding
    return 2 * heads * (keys * even_dim + even_keys * head_dim) + threads * in_thread
