"""Every private name of PyTorch that slicemod's engine uses: what each is for, and what asks PyTorch officially.

PyTorch may rename them in any release. `tests/test_torch_internals.py` says which one is gone, and this file is where
it is mended. They are bound here once: between large matrix products, which empty the caches, looking a name up through
PyTorch's modules takes longer than the question itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.nn.modules import module

# Is autocast on for any device? One question in place of a device's name and two.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

# What looks on at the operators: torch.jit's tracer, modes such as a FLOP counter, torch.compile, torch.func.
tracing_state: Callable[[], object] = torch._C._get_tracing_state
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
compiling_frames: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback
innermost_transformation: Callable[[], object] = torch._C._functorch.peek_interpreter_stack

# Tensors with sizes, strides and a device, and without memory: stand-ins to ask PyTorch about.
FakeTensor: Any = fake_tensor.FakeTensor
FakeTensorMode: Any = fake_tensor.FakeTensorMode

# Is there a hook for all modules? To call a module's parts by hand would go past it.
has_any_global_hook: Callable[[], bool] = module._has_any_global_hook

# The value of the SDPBackend that F.scaled_dot_product_attention would run.
fused_choice: Callable[..., int] = torch._fused_sdp_choice

# PyTorch's flash attention for the CPU, which returns the log-sum-exp as well, and its backward pass.
cpu_flash_attention: Callable[..., tuple[Tensor, Tensor]] = torch._scaled_dot_product_flash_attention_for_cpu
cpu_flash_attention_operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
cpu_flash_attention_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# The backward pass of a softmax into a tensor that is there already.
softmax_backward_into: Any = torch.ops.aten._softmax_backward_data.out

# Does this CPU have instructions for half precision that oneDNN multiplies with?
multiplies_bfloat16: Callable[[], bool] = torch.ops.mkldnn._is_mkldnn_bf16_supported
multiplies_float16: Callable[[], bool] = torch.ops.mkldnn._is_mkldnn_fp16_supported
has_tiles: Callable[[], bool] = torch.cpu._is_amx_tile_supported
has_bfloat16_vectors: Callable[[], bool] = torch.cpu._is_avx512_bf16_supported

# Has this CPU the vectors that oneDNN's float32 convolutions want?
has_avx2: Callable[[], bool] = torch.cpu._is_avx2_supported


def differentiates_forward() -> bool:
    """Forward-mode differentiation (`torch.func.jvp`) is going on."""
    return forward_ad._current_level >= 0
