"""Peak memory of a call, read off the allocator rather than off the process.

RSS does not tell: glibc keeps freed pages, so a second call looks free of charge. The profiler records every
allocation of PyTorch's CPU allocator, those inside operators included; their running sum has the true peak.
"""

import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], object]) -> int:
    """Peak bytes that `call` held at once on the CPU beyond what was allocated when it began.

    What `call` returns counts while it lives; inputs made beforehand do not. Memory that libraries take outside
    PyTorch's allocator (MKL's packing buffers, Python objects) is not seen.

    >>> import torch
    >>> peak_memory(lambda: torch.zeros(1000))
    4000
    """
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
