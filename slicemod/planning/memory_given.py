"""What memory the field of a function or the option of a command gives, on a device that need not be there."""

import torch

from slicemod.memory.budget import Budget
from slicemod.user_error import FieldError


def is_here(device: torch.device) -> bool:
    """This machine has a device of that type, and this PyTorch can use it."""
    return device.type == "cpu" or (
        torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device(device.type)
    )


def bytes_given(field: str, given: str, device: torch.device) -> int:
    """Bytes that `given` is on a device: a size, or a share of what is free there.

    Args:
        field: its name, for errors.
        given: as a budget is written.
        device: where.

    Raises:
        FieldError: `given` is no budget, or a share of a device that is not there.
    """
    try:
        budget = Budget.parse(given)
        if budget.bytes is None and not is_here(device):
            raise FieldError(
                f"{field}: expected a size such as 8GiB, since this machine has no {device.type} whose free memory "
                f"could be read; got {given!r}. Write the size, or choose another device."
            )
        return budget.bytes_on(device)
    except (ValueError, RuntimeError) as error:
        raise FieldError(f"{field}: {error}") from error
