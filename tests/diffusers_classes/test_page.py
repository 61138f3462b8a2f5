"""The page on diffusers' model classes: it says what its results say, and these are what slicemod promises."""

from __future__ import annotations

from tests.diffusers_classes.page import page
from tests.diffusers_classes.results import PAGE, read_results


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results())


def test_every_call_of_every_class_was_sliced_and_came_out_equal() -> None:
    attending = [trial for trial in read_results().trials if trial.attends]
    assert len(attending) >= 90
    for trial in attending:
        assert (trial.sliced, trial.passed_on) == (trial.attends, None), trial
        # As close as PyTorch's own two ways of computing attention are to each other.
        assert trial.sdpa_difference is not None
        assert trial.yardstick is not None
        assert trial.sdpa_difference <= max(1e-6, 3 * trial.yardstick), trial
        assert trial.restored is not False, trial
