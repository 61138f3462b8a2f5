from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slicemod.watched import constant_in_graph, is_watched


def test_what_pytorch_marks_constant_is_marked_the_same_way() -> None:
    def by_us() -> None: ...
    def by_pytorch() -> None: ...

    assert constant_in_graph(by_us) is by_us
    torch.compiler.assume_constant_result(by_pytorch)  # type: ignore[no-untyped-call]
    assert vars(by_us) == vars(by_pytorch) != {}


def test_a_plain_call_is_not_watched() -> None:
    assert not is_watched(torch.ones(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_looks_on_where_it_gave_a_function_up() -> None:
    """It still traces what such a function calls: slices in a loop would be unrolled."""
    answers = []

    def function(x: Tensor, factor: float) -> Tensor:
        answers.append(is_watched(x))
        return x * factor

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for factor in (1.5, 2.5, 3.5):
            compiled(torch.ones(3), factor)
    assert answers == [True, True, True]
