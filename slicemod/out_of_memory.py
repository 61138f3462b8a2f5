"""What happens when a device runs out of memory in spite of a plan: smaller slices, said once.

A plan counts what attention allocates, but others allocate too, and memory fragments.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from slicemod.math_kernel import Call

Result = TypeVar("Result")

# How allocators say it that do not raise torch.OutOfMemoryError: the CPU's, and Metal's.
_MESSAGES = ("can't allocate memory", "out of memory", "Invalid buffer size")

_said: set[str] = set()  # device types that the warning was given for


class SmallerSlicesWarning(RuntimeWarning):
    """A device ran out of memory, and attention went on in smaller slices than planned."""


def with_smaller_slices(run: Callable[[Call], Result], call: Call, queries: int, device: torch.device) -> Result:
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
            if not _ran_out(error) or call.dropout_p > 0 or (call.rows == 1 and call.heads == 1 and call.keys <= 1):
                raise
            reason = str(error).splitlines()[0]
        # Out of the handler, whose traceback would keep the tensors of the failed try.
        smaller = _halved(call)
        _say_once(call, smaller, device, reason)
        call = smaller
        gc.collect()
        if device.type not in ("cpu", "meta"):
            torch.accelerator.empty_cache()


def _ran_out(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def _halved(call: Call) -> Call:
    if call.rows > 1:
        return replace(call, rows=(call.rows + 1) // 2, items=1)
    if call.heads > 1:
        return replace(call, heads=(call.heads + 1) // 2, items=1)
    return replace(call, keys=(call.keys + 1) // 2)


def _say_once(call: Call, smaller: Call, device: torch.device, reason: str) -> None:
    if device.type in _said:
        return
    _said.add(device.type)
    warnings.warn(
        f"attention ran out of memory on {device} with slices of {_sizes(call)} and goes on "
        f"with {_sizes(smaller)}; a smaller budget saves the failed try. The device said: {reason}",
        SmallerSlicesWarning,
        stacklevel=2,
    )


def _sizes(call: Call) -> str:
    return f"{call.rows} rows by {call.heads} heads" + (f" by {call.keys} keys" if call.keys else "")
