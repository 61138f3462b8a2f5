"""What oneDNN's bfloat16 products allocate inside PyTorch's CPU flash attention: read off torch 2.14, to the byte.

Only the backward pass multiplies transposed blocks, which oneDNN packs into a scratchpad. CPUs without bfloat16
instructions take another route and allocate nothing.
"""

_KEY_BLOCK, _COLUMN_BLOCK = 256, 64
_PER_THREAD, _PER_CALL = 640, 512


def flash_scratch_bytes(rows: int, keys: int, head_dim: int, threads: int) -> int:
    """Bytes for blocks of `rows` queries by `keys` keys.

    >>> flash_scratch_bytes(256, 512, 64, threads=1)
    230532
    """
    columns = min(_round_up(head_dim, 16), _COLUMN_BLOCK)
    split = threads if head_dim <= _COLUMN_BLOCK else 1  # wide heads may be split by columns instead
    block = min(-(-keys // split), _KEY_BLOCK)
    transposed_keys = threads * (2 * rows * (block + columns) + 4 * block * columns + _PER_THREAD) + _PER_CALL
    transposed_rows = 4 * rows * min(head_dim, _COLUMN_BLOCK) + threads * (128 * _round_up(keys, 32) + 1024)
    return max(transposed_keys, transposed_rows) + 4  # and a counter


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
