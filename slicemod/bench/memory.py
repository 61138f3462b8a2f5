"""Peak memory of a call, read off the allocator rather than off the process.

RSS does not tell: glibc keeps freed pages, so a second call looks free of charge. On a CPU the profiler records every
allocation of PyTorch's allocator, those inside operators included; their running sum has the true peak. A CUDA
allocator keeps that maximum itself: of the bytes that it was asked for, since what it hands out beyond them, up to
1 MiB an allocation, depends on what its cache happened to hold.
"""

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak bytes that `call` held at once on `device` beyond what was allocated when it began.

    What `call` returns counts while it lives; inputs made beforehand do not. Memory that libraries take outside
    PyTorch's allocator (MKL's packing buffers, Python objects) is not seen.

    Args:
        call: what is measured; called once.
        device: a CPU or a CUDA device.

    Raises:
        ValueError: there is no way to measure on this kind of device.
        RuntimeError: this PyTorch records no allocations.

    >>> import torch
    >>> peak_memory(lambda: torch.zeros(1000))
    4000
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_peak(call)
    if device.type == "cuda":
        return _cuda_peak(call, device)
    raise ValueError(
        f"peak_memory: expected a cpu or cuda device, whose allocators tell their peak; got {device}. Measure there."
    )


def _cpu_peak(call: Callable[[], object]) -> int:
    # Kineto reads this at its first use; below 6 it writes a line at every start and stop, and an error where a CUDA
    # build of PyTorch finds no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # acc_events: without it the profiler warns that it would clear its events on a second cycle.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = call()
        del result
    if recorded.profiler is None or recorded.profiler.kineto_results is None:
        raise RuntimeError(
            "peak_memory: torch.profiler recorded nothing; expected a PyTorch built with Kineto. "
            "Install a PyTorch wheel from the official index."
        )
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before)
