"""What a kernel is: a way to compute attention that says itself what it can do, what it takes and when it pays off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor

from slicemod.call import AttentionShape, CallSpec
from slicemod.plan import SlicePlan

_LOGSUMEXP_BYTES = 4  # a row's log-sum-exp, in float32


class Terms(NamedTuple):
    """What a user asks of a plan, besides a budget.

    Attributes:
        policy: who decides the number of slices.
        steps: the number of slices along the queries, where it is given.
        checkpoint: the backward pass recomputes each slice.
        upcast: scores are computed in float32.
    """

    policy: str = "exact"
    steps: int | None = None
    checkpoint: bool = True
    upcast: bool = False


class Arguments(NamedTuple):
    """The arguments of a call besides its tensors, as `F.scaled_dot_product_attention` has them.

    Attributes:
        dropout_p: probability of dropping an attention weight.
        is_causal: query `i` sees keys `0..i`.
        scale: factor of the scores; None for `1 / sqrt(D)`.
        enable_gqa: key and value may have fewer heads than query.
        training: gradients will be needed.
        choice: on CUDA, the value of the `SDPBackend` that PyTorch would run; None where it was not asked.
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
        name: what it is called in `SliceConfig.kernel` and in plans.
        summary: what it is, in a line.
        takes_steps: it can be told its number of slices, `SliceConfig.steps`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    takes_steps: ClassVar[bool] = False

    @abstractmethod
    def obstacle(self, call: CallSpec) -> str | None:
        """Why it cannot run this call, or None if it can."""

    @abstractmethod
    def plan(self, call: CallSpec, free_bytes: int, terms: Terms) -> SlicePlan | None:
        """The plan of a call without obstacle, with the bytes that it takes; None where these are more than are free.

        Raises:
            NotEnoughMemoryError: there is none, and the kernel knows more about it than what it needs.
        """

    @abstractmethod
    def attend(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Tensor:
        """Attention of query `(B, H, N, D)`, key `(B, Hk, M, D)`, value `(B, Hk, M, Dv)` and a 4-D mask by a plan.

        Can be traced for compilation.

        Returns:
            `(B, H, N, Dv)`.
        """

    def pays_off(self, call: CallSpec) -> bool:
        """No kernel further down the list is measured to be faster for this call."""
        return True

    def prepare(self, plan: SlicePlan, inputs: Inputs, more: Arguments) -> Run:
        """`attend` for calls like this one, which is kept: of these sizes, strides, dtypes and arguments.

        Only where nothing traces, transforms or counts operators.
        """

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return self.attend(plan, (query, key, value, mask), more)

        return run

    def kept_bytes(self, shape: AttentionShape, *, training: bool) -> int:
        """Bytes that it keeps from forward to backward beyond inputs and output: a number for each row, mostly."""
        return shape.batch_heads * shape.queries * _LOGSUMEXP_BYTES if training else 0
