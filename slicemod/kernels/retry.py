"""What happens if a device runs out of memory although the plan fitted: smaller slices, and one warning.

A plan counts what attention allocates. But other code allocates too, and memory fragments.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from slicemod.kernels.sliced.loop import SlicedCall

Result = TypeVar("Result")

# Texts in the errors of allocators that do not raise torch.OutOfMemoryError: the CPU's and Metal's.
_MESSAGES = ("can't allocate memory", "out of memory", "Invalid buffer size")

SAID_OF: set[str] = set()  # device types that the warning was given for


class SmallerSlicesWarning(RuntimeWarning):
    """A device ran out of memory, and attention continued in smaller slices than planned."""


def with_smaller_slices(
    run: Callable[[SlicedCall], Result], call: SlicedCall, queries: int, device: torch.device
) -> Result:
    """`run(call)`. If the device runs out of memory, it runs again with half the rows, then with half the heads.

    Chunks of keys, if the plan has them, are halved last.

    With dropout there is no second try: each slice draws its own random numbers, and the backward pass has to draw the
    same ones as the forward pass.

    Raises:
        RuntimeError: the device runs out of memory even with the smallest slices.
    """
    call = replace(call, rows=max(1, min(call.rows, queries)))
    while True:
        try:
            return run(call)
        except RuntimeError as error:
            if not ran_out(error) or call.dropout_p > 0 or (call.rows == 1 and call.heads == 1 and call.keys <= 1):
                raise
            reason = str(error).splitlines()[0]
        # This is outside of the except block, because the traceback keeps the tensors of the failed try alive.
        smaller = _halved(call)
        say_once(device, f"slices of {_sizes(call)}", _sizes(smaller), reason)
        call = smaller
        gc.collect()
        if device.type not in ("cpu", "meta"):
            torch.accelerator.empty_cache()


def with_fewer_threads(run: Callable[[int], Result], threads: int) -> Result:
    """`run(threads)` on the CPU. If that runs out of memory, it runs again with half the threads, which take less.

    Raises:
        RuntimeError: it runs out of memory even with one thread.
    """
    while True:
        try:
            return run(threads)
        except RuntimeError as error:
            if not ran_out(error) or threads == 1:
                raise
            reason = str(error).splitlines()[0]
        say_once(torch.device("cpu"), f"the blocks of {threads} threads", f"those of {threads // 2}", reason)
        threads //= 2
        gc.collect()


def ran_out(error: RuntimeError) -> bool:
    """Whether the error is an allocator's, for lack of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def _halved(call: SlicedCall) -> SlicedCall:
    if call.rows > 1:
        return replace(call, rows=(call.rows + 1) // 2, items=1)
    if call.heads > 1:
        return replace(call, heads=(call.heads + 1) // 2, items=1)
    return replace(call, keys=(call.keys + 1) // 2)


def say_once(device: torch.device, tried: str, smaller: str, reason: str) -> None:
    """Warn of the slices that did not fit, once for each type of device."""
    if device.type in SAID_OF:
        return
    SAID_OF.add(device.type)
    warnings.warn(
        f"attention ran out of memory on {device} with {tried} and goes on with {smaller}; a smaller budget saves the "
        f"failed try. The device said: {reason}",
        SmallerSlicesWarning,
        stacklevel=3,
    )


def _sizes(call: SlicedCall) -> str:
    return f"{call.rows} rows by {call.heads} heads" + (f" by {call.keys} keys" if call.keys else "")
