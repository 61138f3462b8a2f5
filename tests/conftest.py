"""What all tests share: one thread, a seed, and which tests a plain run leaves out."""

from __future__ import annotations

import math
import os
import sys
import time
import types

import hypothesis
import pytest
import torch

from slicemod.kernels.retry import SAID_OF
from slicemod.memory.free_memory import PROBES, MemoryProbe

# The same examples in every run, more of them with the slow tests; `--hypothesis-profile thorough` looks for new ones.
hypothesis.settings.register_profile("fast", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.register_profile("slow", deadline=None, derandomize=True, max_examples=200)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)

TOO_LATE = "not begun at the time of --until"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--run-slow` runs tests marked slow, `--gpu-check` those marked gpu_check; `--until` leaves out the latest."""
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")
    until = "leave out, and count, the tests that have not begun at that time: seconds since 1970, as of `date +%%s`"
    parser.addoption("--until", type=float, default=math.inf, metavar="SECONDS", help=until)
    parser.addoption("--gpu-check", action="store_true", help="compile the Triton kernels for all cards")


def pytest_configure(config: pytest.Config) -> None:
    """One thread: plans of the fused kernel count threads, and parallel workers share the cores."""
    torch.set_num_threads(1)
    os.environ.setdefault("SLICEMOD_TABLE", "built-in")  # not what `slicemod tune` measured on this machine
    # Inductor looks compiled code up by what it computes, not by the instructions that it was compiled for.
    compiled = config.rootpath / "build" / f"inductor-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    # Hypothesis' own plugin comes later, and with it a profile that is asked for.
    hypothesis.settings.load_profile("slow" if config.getoption("--run-slow") else "fast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this run or this machine cannot do."""
    slow = pytest.mark.skip(reason="slow: pass --run-slow")
    cuda = pytest.mark.skip(reason="needs a CUDA device")
    gpu_check = pytest.mark.skip(reason="compiles for one more GPU: pass --gpu-check")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(cuda)
        if item.get_closest_marker("gpu_check") and not config.getoption("--gpu-check"):
            item.add_marker(gpu_check)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what has not begun at the time of `--until`."""
    if time.time() > item.config.getoption("--until"):
        pytest.skip(TOO_LATE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests `--until` left out: a run that is cut short passes, but must not look whole."""
    late = [report for report in terminalreporter.getreports("skipped") if TOO_LATE in str(report.longrepr)]
    if late:
        terminalreporter.write_sep("=", f"WARNING: {len(late)} tests left out: {TOO_LATE}", red=True, bold=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a CPU has free: the last of these."""
    answers = [2**30]
    monkeypatch.setitem(PROBES, "cpu", MemoryProbe(lambda device: answers[-1]))
    return answers


@pytest.fixture
def nothing_said() -> None:
    """No device has been said to run out of memory: that is said once."""
    SAID_OF.clear()


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    """LDM's UNet asks whether its `context_dim` is an omegaconf list; in tests it is a number."""
    lists = types.ModuleType("omegaconf.listconfig")
    vars(lists)["ListConfig"] = type("ListConfig", (list,), {})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.listconfig", lists)
