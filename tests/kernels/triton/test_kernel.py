"""Where the Triton kernel runs, what it says where it does not, and which calls `auto` gives it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slicemod.call import AttentionShape, CallSpec, Layout, MaskShape
from slicemod.choose import answers, choose
from slicemod.config import SliceConfig
from slicemod.functional import sliced_attention
from slicemod.kernels.kernel import Terms
from slicemod.kernels.table_in_use import NO_TABLE
from slicemod.kernels.triton.kernel import TritonKernel
from slicemod.kernels.triton.present import architecture_obstacle, interpreted, triton_obstacle
from tests.kernels.triton.versions import too_old
from tests.oracle import layer_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(2, 8, 1031, 1031, 40, 2)
CALL = CallSpec.planned(SHAPE, CUDA)
KERNEL = TritonKernel(device_obstacle=lambda device: None)


@pytest.mark.parametrize("card", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"])
def test_it_runs_on_cards_that_multiply_half_precision_by_triton(card: str) -> None:
    assert architecture_obstacle(card) is None


@pytest.mark.parametrize(
    ("card", "reason"),
    [("sm_75", "from Ampere (sm_80) on"), ("sm_70", "sm_70"), ("gfx1100", "CDNA"), ("gfx908", "MI200")],
)
def test_other_cards_are_refused_by_name(card: str, reason: str) -> None:
    assert reason in str(architecture_obstacle(card))


@pytest.mark.skipif(interpreted(), reason="Triton interprets here")
def test_a_cpu_is_told_how_it_would_run_there() -> None:
    assert "TRITON_INTERPRET=1" in str(triton_obstacle(CPU))
    with pytest.raises(ValueError, match='kernel="triton"; it runs on GPUs, and the call is on cpu'):
        layer_inputs().run(sliced_attention, slicing={"kernel": "triton"})


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_are_refused_by_name(device: str) -> None:
    assert device in str(triton_obstacle(torch.device(device)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, which is asked")
def test_a_card_that_is_not_here_is_planned_for() -> None:
    assert triton_obstacle(CUDA) is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (CallSpec.planned(replace(SHAPE, itemsize=8), CUDA), "float64"),
        (replace(CALL, transformed=True), "torch.func"),
        (replace(CALL, ordinary_scale=False), "scale"),
        (replace(CALL, shape=replace(SHAPE, head_dim=0)), "without channels"),
        (replace(CALL, shape=replace(SHAPE, value_dim=0)), "without channels"),
        (replace(CALL, shape=replace(SHAPE, keys=1), training=True), "where there is one key"),
    ],
)
def test_what_it_does_not_compute_is_said(call: CallSpec, reason: str) -> None:
    assert reason in str(KERNEL.obstacle(call))


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        replace(SHAPE, head_dim=512, value_dim=23),
        replace(SHAPE, key_heads=2, causal=True),
        replace(SHAPE, dropout=True, mask=MaskShape(1, 8, 1, 1031, has_grad=True)),
        replace(SHAPE, mask=MaskShape(2, 1, 1031, 1031, is_bool=True)),
        replace(SHAPE, irregular=True),
    ],
)
def test_its_plan_is_eight_bytes_a_row_in_training_and_else_nothing(shape: AttentionShape) -> None:
    seed = 8 if shape.dropout else 0
    for training, need in ((False, seed), (True, 8 * 2 * 8 * 1031 + seed)):
        call = CallSpec.planned(shape, CUDA, training=training)
        assert KERNEL.obstacle(call) is None
        plan = KERNEL.plan(call, need, Terms())
        assert plan is not None
        assert (plan.peak_bytes, plan.steps, plan.kernel) == (need, 1, "triton")
        assert need == 0 or KERNEL.plan(call, need - 1, Terms()) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, which is asked")
def test_auto_takes_it_where_pytorchs_kernel_does_not_fit() -> None:
    fused = choose(CALL, SliceConfig(kernel="fused"), 2**40)
    assert choose(CALL, SliceConfig(), fused.peak_bytes).kernel == "fused"
    assert choose(CALL, SliceConfig(), fused.peak_bytes - 1).kernel == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, which is asked")
def test_auto_takes_it_where_pytorchs_kernel_does_not_run() -> None:
    told = answers(replace(CALL, layout=Layout(runs=())), SliceConfig(), 2**40)
    assert [answer.kernel for answer in told if answer.passed_over is None] == ["triton"]


def test_it_pays_off_on_gpus_alone() -> None:
    assert KERNEL.pays_off(CALL, NO_TABLE)
    assert not KERNEL.pays_off(replace(CALL, device=CPU), NO_TABLE)


@pytest.mark.skipif(interpreted(), reason="the tests run in the interpreter now")
@pytest.mark.skipif(too_old() is not None, reason=str(too_old()))
@pytest.mark.slow
def test_a_layer_is_as_exact_as_sdpa_in_the_interpreter() -> None:
    """A few of what `make gpu-check` runs, in a process of its own, as Triton looks at the environment but once."""
    file = Path(__file__).parent / "test_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", "test_a_layer"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
