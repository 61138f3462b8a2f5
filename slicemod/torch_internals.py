"""Every private name of PyTorch that slicemod's engine uses: what each is for, and what asks PyTorch officially.

PyTorch may rename them in any release. Importing this file then says which one is gone, and so does
`tests/test_torch_internals.py` of all of them; this file is where it is mended. They are bound here once: between large
matrix products, which empty the caches, looking a name up through PyTorch's modules takes longer than the question
itself.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def private(name: str) -> Any:
    """What PyTorch has under a dotted name.

    Raises:
        ImportError: it has no such name.
    """
    try:
        return pkgutil.resolve_name(name)
    except AttributeError as error:
        raise ImportError(
            f"{name}: expected in PyTorch, which does not promise to keep it; PyTorch {torch.__version__} has none. "
            "Install the version of PyTorch that this slicemod names, or a newer slicemod.",
            name=name,
        ) from error


# Is autocast on for any device? One question in place of a device's name and two.
is_any_autocast_enabled: Callable[[], bool] = private("torch._C._is_any_autocast_enabled")

# What looks on at the operators: torch.jit's tracer, modes such as a FLOP counter, torch.compile, torch.func.
tracing_state: Callable[[], object] = private("torch._C._get_tracing_state")
dispatch_modes: Callable[[], int] = private("torch._C._len_torch_dispatch_stack")
compiling_frames: Callable[[], object] = private("torch._C._dynamo.eval_frame.get_eval_frame_callback")
innermost_transformation: Callable[[], object] = private("torch._C._functorch.peek_interpreter_stack")

# Tensors with sizes, strides and a device, and without memory: stand-ins to ask PyTorch about.
FakeTensor: Any = private("torch._subclasses.fake_tensor.FakeTensor")
FakeTensorMode: Any = private("torch._subclasses.fake_tensor.FakeTensorMode")

# A mode that is told every operator, and the tensors in whatever an operator returns.
if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = private("torch.utils._python_dispatch.TorchDispatchMode")
tree_leaves: Callable[[object], list[Any]] = private("torch.utils._pytree.tree_leaves")

# Is there a hook for all modules? To call a module's parts by hand would go past it.
has_any_global_hook: Callable[[], bool] = private("torch.nn.modules.module._has_any_global_hook")

# The value of the SDPBackend that F.scaled_dot_product_attention would run.
fused_choice: Callable[..., int] = private("torch._fused_sdp_choice")

# PyTorch's flash attention for the CPU, which returns the log-sum-exp as well, and its backward pass.
cpu_flash_attention: Callable[..., tuple[Tensor, Tensor]] = private("torch._scaled_dot_product_flash_attention_for_cpu")
cpu_flash_attention_operator: Any = private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
cpu_flash_attention_backward: Any = private(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
)

# The backward pass of a softmax into a tensor that is there already.
softmax_backward_into: Any = private("torch.ops.aten._softmax_backward_data.out")


def _no() -> bool:
    return False


# Does this CPU have instructions for half precision that oneDNN multiplies with? A PyTorch without oneDNN has no such
# questions.
_has_onednn = torch.backends.mkldnn.is_available()
multiplies_bfloat16: Callable[[], bool] = private("torch.ops.mkldnn._is_mkldnn_bf16_supported") if _has_onednn else _no
multiplies_float16: Callable[[], bool] = private("torch.ops.mkldnn._is_mkldnn_fp16_supported") if _has_onednn else _no
has_tiles: Callable[[], bool] = private("torch.cpu._is_amx_tile_supported")
has_bfloat16_vectors: Callable[[], bool] = private("torch.cpu._is_avx512_bf16_supported")

# Has this CPU the vectors that oneDNN's float32 convolutions want?
has_avx2: Callable[[], bool] = private("torch.cpu._is_avx2_supported")


private("torch.autograd.forward_ad._current_level")


def differentiates_forward() -> bool:
    """Forward-mode differentiation (`torch.func.jvp`) is going on."""
    return forward_ad._current_level >= 0
