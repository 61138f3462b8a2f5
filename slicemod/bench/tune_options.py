"""What `slicemod tune` is told; without PyTorch, so that `--help` is answered at once."""

from __future__ import annotations

from slicemod.arguments import ArgumentParser


def parser(name: str = "tune") -> ArgumentParser:
    """The parser of its arguments."""
    options = ArgumentParser(
        f"slicemod {name}",
        description="Measures on this machine from which size on each kernel for CPUs is faster than the ones below it "
        "in the list, and keeps that as a table, by which `auto` then chooses. It takes under two minutes on two idle "
        "cores.",
        epilog="The table is kept beside the compiled kernel, in $SLICEMOD_CACHE or in slicemod below the user's cache "
        "folder. It holds for this processor, this version of PyTorch and of the kernel, and this number of threads "
        "(OMP_NUM_THREADS); for any other the built-in table serves. Where a measurement is undecided, the built-in "
        "table decides. SLICEMOD_TABLE=built-in, or SLICEMOD_TABLE=FILE, pins a table. A training keeps the table that "
        "it began with in its checkpoints.",
    )
    options.add_argument("--reset", action="store_true", help="remove the table, so that the built-in one serves again")
    options.add_argument("--output", metavar="FILE", help="write the table here instead, to pin it or to look at it")
    options.add_argument("--seconds", type=float, default=110, help="measure no longer than these (default: 110)")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return options
