"""Which Triton is here. That of the oldest PyTorch compiles the kernels too, but is not what they were tuned for."""

from importlib.metadata import PackageNotFoundError, version

LEAST = 3, 8


def too_old() -> str | None:
    """Why no result is expected of the Triton that is here, or None."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "there is no Triton"
    if tuple(map(int, found.split(".")[:2])) < LEAST:
        return f"Triton {found}: its interpreter does not take this numpy, and tiles are chosen for 3.8"
    return None
