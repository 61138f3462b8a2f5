"""The ways to compute attention. `KERNELS` lists them, best first; everything that chooses or plans reads this list.

A kernel is a folder here and a line in the list. The folder's `kernel.py` says what the kernel can run, how many bytes
it takes, and when it pays off.
"""

from slicemod.kernels.fused.float32_kernel import Float32FlashKernel
from slicemod.kernels.fused.kernel import FusedKernel
from slicemod.kernels.kernel import Kernel
from slicemod.kernels.native.kernel import NativeKernel
from slicemod.kernels.sliced.kernel import SlicedKernel
from slicemod.kernels.triton.kernel import TritonKernel

KERNELS: tuple[Kernel, ...] = (
    NativeKernel(),
    Float32FlashKernel(),
    FusedKernel(),
    TritonKernel(),
    SlicedKernel(),
)


def kernel_named(name: str) -> Kernel:
    """The kernel with this name.

    Raises:
        ValueError: no kernel has this name.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"kernel: expected one of {', '.join(kernel.name for kernel in KERNELS)}; got {name!r}.")
