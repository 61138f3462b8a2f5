"""What a kernel is: a way to compute attention that knows what it can run, how many bytes it takes, and when it pays
off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor

from slicemod.call import AttentionShape, CallSpec
from slicemod.kernels.crossover_table import CrossoverTable
from slicemod.plan import NotEnoughMemoryError, SlicePlan


class Terms(NamedTuple):
    """What the user asks of a plan, besides the budget. The fields are those of `SliceConfig`.

    Attributes:
        policy: who decides the number of slices.
        steps: the number of slices along the queries, if the user gave it.
        checkpoint: the backward pass recomputes each slice.
        upcast: scores are computed in float32.
    """

    policy: str = "exact"
    steps: int | None = None
    checkpoint: bool = True
    upcast: bool = False


class Arguments(NamedTuple):
    """The arguments of a call besides its tensors. The first four are those of `F.scaled_dot_product_attention`.

    Attributes:
        dropout_p: probability of dropping an attention weight.
        is_causal: query `i` sees keys `0..i`.
        scale: factor of the scores; None for `1 / sqrt(D)`.
        enable_gqa: key and value may have fewer heads than query.
        training: gradients will be needed.
        choice: on CUDA, the value of the `SDPBackend` that PyTorch would run; None if PyTorch was not asked.
    """

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    training: bool = False
    choice: int | None = None


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Kernel(ABC):
    """One way to compute attention. `slicemod.kernels.KERNELS` lists all of them, best first.

    Attributes:
        name: its name in `SliceConfig.kernel` and in plans.
        summary: one line that says what it is.
        takes_steps: the user can give its number of slices, `SliceConfig.steps`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    takes_steps: ClassVar[bool] = False

    @abstractmethod
    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call, or None if it can."""

    @abstractmethod
    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """The plan of a call that has no obstacle, with the bytes that it takes. None if these exceed `free_bytes`.

        Raises:
            NotEnoughMemoryError: no plan fits. Kernels raise this instead of returning None if they have more to say
                than how many bytes they need.
        """

    @abstractmethod
    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """Compute attention of query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)` and a 4-D mask.

        It follows the plan, and can be traced for compilation.

        Returns:
            `(B, H, N, Dv)`.
        """

    def pays_off(self, call: CallSpec, table: CrossoverTable) -> bool:
        """Whether `auto` should take it for this call, rather than a kernel further down the list.

        Each kernel decides by what `table` has measured, and what to do where nothing was. Here it always pays off.
        """
        return True

    def holds(self, plan: SlicePlan, call: CallSpec) -> bool:
        """Whether a call that has no obstacle takes no more than `plan.peak_bytes` if it follows this plan of another
        call. Here for kernels without slices to choose, whose plan of the call would be the same."""
        try:
            return self.plan(call, plan.peak_bytes, Terms()) is not None
        except NotEnoughMemoryError:
            return False

    def prepare(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Run:
        """A function that does what `attend` does, for later calls with these sizes, strides, dtypes and arguments.

        It is called only if nothing traces, transforms or counts operators.
        """

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return self.attend(plan, (query, key, value, mask), more)

        return run

    def kept_bytes(self, call: CallSpec, plan: SlicePlan) -> int:
        """The part of `plan.peak_bytes` that it keeps from forward to backward. Here one number for each row."""
        return row_bytes(call.shape) if call.training else 0


def row_bytes(shape: AttentionShape) -> int:
    """Bytes of one float32 number for each row of the scores, such as its log-sum-exp."""
    return 4 * shape.batch_heads * shape.queries
