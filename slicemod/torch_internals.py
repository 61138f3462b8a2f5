"""Every private name of PyTorch that slicemod uses, and what each is for.

PyTorch may rename them in any release. If one is gone, importing this file says which one, and
`tests/test_torch_internals.py` names all that are gone. This file is the only place to repair. The names are looked up
once, here, because a lookup through PyTorch's modules in every call takes longer than the calls themselves.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def private(name: str) -> Any:
    """PyTorch's object with this dotted name.

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


# PyTorch's version, for what no name tells. Words like "a0" or "+cpu" come after these two numbers.
PYTORCH = int(torch.__version__.split(".")[0]), int(torch.__version__.split(".")[1])

# Is autocast on for any device? Faster than the two public questions, which need the name of a device.
is_any_autocast_enabled: Callable[[], bool] = private("torch._C._is_any_autocast_enabled")

# What may watch the operators: torch.jit's tracer, modes such as a FLOP counter, torch.compile, torch.func.
tracing_state: Callable[[], object] = private("torch._C._get_tracing_state")
dispatch_modes: Callable[[], int] = private("torch._C._len_torch_dispatch_stack")
compiling_frames: Callable[[], object] = private("torch._C._dynamo.eval_frame.get_eval_frame_callback")
innermost_transformation: Callable[[], object] = private("torch._C._functorch.peek_interpreter_stack")

# The torch function modes of this thread: how many, and the one at a place.
function_modes: Callable[[], int] = private("torch._C._len_torch_function_stack")
function_mode_at: Callable[[int], object] = private("torch._C._get_function_stack_at")

# Tensors with sizes, strides and a device but without memory, to ask PyTorch about.
FakeTensor: Any = private("torch._subclasses.fake_tensor.FakeTensor")
FakeTensorMode: Any = private("torch._subclasses.fake_tensor.FakeTensorMode")

# A mode that sees every operator, and a function that finds the tensors in what an operator returns.
if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = private("torch.utils._python_dispatch.TorchDispatchMode")
tree_leaves: Callable[[object], list[Any]] = private("torch.utils._pytree.tree_leaves")

# Is there a hook for all modules? Code that calls a module's parts by hand would bypass it.
has_any_global_hook: Callable[[], bool] = private("torch.nn.modules.module._has_any_global_hook")

# The value of the SDPBackend that F.scaled_dot_product_attention would take.
fused_choice: Callable[..., int] = private("torch._fused_sdp_choice")

# F.scaled_dot_product_attention as an operator, which `sliced_sdpa` leaves alone.
sdpa_operator: Callable[..., Tensor] = private("torch.ops.aten.scaled_dot_product_attention.default")

# PyTorch's flash attention for the CPU, which also returns the log-sum-exp of each row, and its backward pass.
cpu_flash_attention: Callable[..., tuple[Tensor, Tensor]] = private("torch._scaled_dot_product_flash_attention_for_cpu")
cpu_flash_attention_operator: Any = private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
cpu_flash_attention_backward: Any = private(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
)

# PyTorch's attention on Metal. Where it is not there, the sliced kernel takes the calls.
metal_attention_operator: Any = getattr(torch.ops.aten, "_scaled_dot_product_attention_math_for_mps", None)

# The backward pass of a softmax, written into an existing tensor.
softmax_backward_into: Any = private("torch.ops.aten._softmax_backward_data.out")


def _bmm_widened_into() -> Callable[[Tensor, Tensor, Tensor], object] | None:
    """`(left, right, out)`: the batched product of half precision, written into float32. None if PyTorch has none."""
    operator = getattr(torch.ops.aten.bmm, "dtype_out", None)
    if operator is None:
        return None
    return lambda left, right, out: operator(left, right, out.dtype, out=out)


# `torch.bmm(..., out_dtype=torch.float32)`, which is public, with `out=`, which is not. For CUDA alone.
bmm_widened_into = _bmm_widened_into()


def _no() -> bool:
    return False


# Does this CPU have instructions by which oneDNN multiplies half precision? PyTorch without oneDNN lacks these
# functions.
has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
multiplies_bfloat16: Callable[[], bool] = private("torch.ops.mkldnn._is_mkldnn_bf16_supported") if has_onednn else _no
multiplies_float16: Callable[[], bool] = private("torch.ops.mkldnn._is_mkldnn_fp16_supported") if has_onednn else _no
has_tiles: Callable[[], bool] = private("torch.cpu._is_amx_tile_supported")
has_bfloat16_vectors: Callable[[], bool] = private("torch.cpu._is_avx512_bf16_supported")

# oneDNN's product of a linear layer and an activation, or a multiplication by a tensor. `torch.compile` uses them too.
fused_linear: Any = private("torch.ops.mkldnn._linear_pointwise.default") if has_onednn else None
fused_linear_times: Any = private("torch.ops.mkldnn._linear_pointwise.binary") if has_onednn else None

# oneDNN's layout of the weight of a convolution, and the convolution by it. `torch.compile` uses them too.
pack_convolution: Any = private("torch.ops.mkldnn._reorder_convolution_weight.default") if has_onednn else None
packed_convolution: Any = private("torch.ops.mkldnn._convolution_pointwise.default") if has_onednn else None
has_avx512: Callable[[], bool] = private("torch.cpu._is_avx512_supported")

# Does this CPU have AVX2, which oneDNN's backward pass of float32 convolutions needs?
has_avx2: Callable[[], bool] = private("torch.cpu._is_avx2_supported")


private("torch.autograd.forward_ad._current_level")


def differentiates_forward() -> bool:
    """Forward-mode differentiation (such as `torch.func.jvp`) is active."""
    return forward_ad._current_level >= 0
