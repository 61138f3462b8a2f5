"""The ways to compute attention: `KERNELS` lists them, best first. All that chooses or plans reads this list.

A kernel is a folder here, whose `kernel.py` says what it can do, what it takes and when it pays off, and a line below.
"""

from slicemod.kernels.fused.float32_kernel import Float32FlashKernel
from slicemod.kernels.fused.kernel import FusedKernel
from slicemod.kernels.kernel import Kernel
from slicemod.kernels.native.kernel import NativeKernel
from slicemod.kernels.sliced.kernel import SlicedKernel

KERNELS: tuple[Kernel, ...] = (
    NativeKernel(),
    Float32FlashKernel(),
    FusedKernel(),
    SlicedKernel(),
)


def kernel_named(name: str) -> Kernel:
    """The kernel of the list with this name.

    Raises:
        ValueError: there is none.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"kernel: expected one of {', '.join(kernel.name for kernel in KERNELS)}; got {name!r}.")
