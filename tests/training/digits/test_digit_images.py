from __future__ import annotations

import pytest
import torch

from slicemod.training.digits.digit_images import DigitBatches, DigitsDataModule, DigitSplit, digit_splits
from slicemod.user_error import UserError


def test_splits_are_disjoint_stratified_and_fixed() -> None:
    splits, again = digit_splits(), digit_splits()
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sum(sizes.values()) == 1797
    for name, split in splits.items():
        assert torch.equal(split.images, again[name].images)
        shares = torch.bincount(split.labels) / len(split.labels)
        assert shares.min() > 0.09
        assert shares.max() < 0.11


def test_another_seed_gives_another_split() -> None:
    assert not torch.equal(digit_splits()["val"].images, digit_splits(split_seed=1)["val"].images)


def test_images_have_the_asked_size_and_fill_minus_one_to_one() -> None:
    images = digit_splits(image_size=24)["train"].images
    assert images.shape[1:] == (1, 24, 24)
    assert images.min() == -1
    assert images.max() == 1


@pytest.mark.parametrize("stopped_after", [0, 1, 3, 4, 5])
def test_batches_continue_where_they_stopped(stopped_after: int) -> None:
    split = DigitSplit(torch.zeros(13, 1, 2, 2), torch.arange(13))

    def stream(batches: DigitBatches, count: int) -> list[list[int]]:
        seen: list[list[int]] = []
        while len(seen) < count:
            for batch in batches:
                seen.append(batch["label"].tolist())
                if len(seen) == count:
                    break
        return seen

    whole = stream(DigitBatches(split, 3, shuffle_seed=0), 9)
    first = DigitBatches(split, 3, shuffle_seed=0)
    begun = stream(first, stopped_after)
    second = DigitBatches(split, 3, shuffle_seed=0)
    second.load_state_dict(first.state_dict())
    assert begun + stream(second, 9 - stopped_after) == whole


def test_epochs_are_shuffled_differently_and_validation_is_not() -> None:
    split = DigitSplit(torch.zeros(13, 1, 2, 2), torch.arange(13))
    shuffled = DigitBatches(split, 13, shuffle_seed=0)
    first, second = ([batch["label"].tolist() for batch in shuffled] for _ in range(2))
    assert first != second
    fixed = DigitBatches(split, 5)
    assert len(fixed) == 3
    assert [label for batch in fixed for label in batch["label"].tolist()] == list(range(13))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"image_size": 0}, {"val_fraction": 0.6, "test_fraction": 0.5}])
def test_impossible_sizes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        DigitsDataModule(**wrong)  # type: ignore[arg-type]


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size must be at most"):
        DigitsDataModule(batch_size=1798).train_dataloader()
