"""`python -m tests.diffusers_classes CHECKOUT`: run every model class of diffusers, and renew the page."""

from __future__ import annotations

import argparse
import subprocess
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from rich.progress import track

from tests.diffusers_classes.configurations import model_classes, own_configurations
from tests.diffusers_classes.more_configurations import PARTS, more_configurations
from tests.diffusers_classes.page import page
from tests.diffusers_classes.results import PAGE, RESULTS, Results
from tests.diffusers_classes.trial import try_out


def main() -> None:
    """Write docs/diffusers-classes.json and docs/diffusers-classes.md."""
    parser = argparse.ArgumentParser(prog="make hosts-table", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers' sources, whose tests have configurations")
    checkout = parser.parse_args().checkout
    if not (checkout / "tests" / "models").is_dir():
        parser.error(f"checkout: expected a folder with tests/models in it, as diffusers' sources have; got {checkout}")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of deprecations in the classes
    torch.set_num_threads(1)  # these models are too small for more
    configurations, failed = own_configurations(checkout)
    for name, reason in failed.items():
        print(f"left out {name}: {reason}")
    known = {configuration.model_class.__name__ for configuration in configurations}
    configurations += [each for each in more_configurations() if each.model_class.__name__ not in known]
    trials = [try_out(each.model_class.__name__, each) for each in track(configurations, "diffusers' model classes")]
    ran = {trial.model for trial in trials}
    not_run = {name: PARTS.get(name, "no small configuration") for name in model_classes() if name not in ran}
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=checkout, capture_output=True, text=True)
    versions = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }
    results = Results(versions, trials, not_run)
    results.write()
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"wrote {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
