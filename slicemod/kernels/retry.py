"""What happens when a device runs out of memory in spite of a plan: smaller slices, said once.

A plan counts what attention allocates, but others allocate too, and memory fragments.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from slicemod.kernels.sliced.loop import SlicedCall

Result = TypeVar("Result")

# How allocators say it that do not raise torch.OutOfMemoryError: the CPU's, and Metal's.
_MESSAGES = ("can't allocate memory", "out of memory", "Invalid buffer size")

SAID_OF: set[str] = set()  # device types that the warning was given for


class SmallerSlicesWarning(RuntimeWarning):
    """A device ran out of memory, and attention went on in smaller slices than planned."""


def with_smaller_slices(
    run: Callable[[SlicedCall], Result], call: SlicedCall, queries: int, device: torch.device
) -> Result:
    """`run(call)`; where the device runs out of memory, again with half the rows, and at one row half the heads.

    Chunks of keys, where a plan has them, are halved last.

    With dropout there is no second try: the draw belongs to the slices, and backward has to repeat that of forward.

    Raises:
        RuntimeError: the device runs out of memory with the smallest slices as well.
    """
    call = replace(call, rows=max(1, min(call.rows, queries)))
    while True:
        try:
            return run(call)
        except RuntimeError as error:
            if not ran_out(error) or call.dropout_p > 0 or (call.rows == 1 and call.heads == 1 and call.keys <= 1):
                raise
            reason = str(error).splitlines()[0]
        # Out of the handler, whose traceback would keep the tensors of the failed try.
        smaller = _halved(call)
        say_once(device, f"slices of {_sizes(call)}", _sizes(smaller), reason)
        call = smaller
        gc.collect()
        if device.type not in ("cpu", "meta"):
            torch.accelerator.empty_cache()


def with_fewer_threads(run: Callable[[int], Result], threads: int) -> Result:
    """`run(threads)` on the CPU; where that runs out of memory, again with half the threads, each of which takes some.

    Raises:
        RuntimeError: it runs out of memory with one thread as well.
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
    """An allocator said that there is no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def _halved(call: SlicedCall) -> SlicedCall:
    if call.rows > 1:
        return replace(call, rows=(call.rows + 1) // 2, items=1)
    if call.heads > 1:
        return replace(call, heads=(call.heads + 1) // 2, items=1)
    return replace(call, keys=(call.keys + 1) // 2)


def say_once(device: torch.device, tried: str, smaller: str, reason: str) -> None:
    """Warn of what did not fit, once for each type of device."""
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
