"""Whole numbers rounded up."""


def ceil_div(size: int, parts: int) -> int:
    """`size / parts` rounded up, in ints.

    >>> ceil_div(7, 2)
    4
    """
    return -(-size // parts)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`.

    >>> round_up(7, 4)
    8
    """
    return ceil_div(size, multiple) * multiple
