"""Sizes in bytes as text for people."""


def size_text(size: int) -> str:
    """`size` bytes in the largest of the units B, KiB, MiB and GiB that gives a number of at least 1.

    >>> size_text(613), size_text(3 * 2**9), size_text(8_388_608), size_text(3 * 2**29)
    ('613 B', '1.5 KiB', '8.0 MiB', '1.50 GiB')
    """
    if size < 2**10:
        return f"{size:,} B"
    if size < 2**20:
        return f"{size / 2**10:,.1f} KiB"
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def exact_size_text(size: int) -> str:
    """`size_text` together with the exact number of bytes.

    >>> exact_size_text(613), exact_size_text(8_388_608)
    ('613 bytes', '8.0 MiB (8,388,608 bytes)')
    """
    return f"{size:,} bytes" if size < 2**10 else f"{size_text(size)} ({size:,} bytes)"
