from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.training.stable_diffusion.text_encoders import TextEncoders, load_text_encoders, tell_of_cut
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import WIDTH, whole_model

LENGTH, ROOM = 11, 9  # of the small encoder, with start and end and without


def encoders(folder: Path, kind: str, chunks: int) -> TextEncoders:
    if not (folder / kind).exists():
        whole_model(folder / kind, kind)
    return load_text_encoders(Pretrained(str(folder / kind)), 75 * chunks)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_long_captions_are_embedded_in_chunks_with_starts_and_ends_of_their_own(kind: str, tmp_path: Path) -> None:
    words = ["abcdefghi", "jklmnopqr", "stuv"]  # a letter is a token: of as many as a chunk takes, and fewer
    one, three = (encoders(tmp_path, kind, chunks) for chunks in (1, 3))
    whole = three.encode([" ".join(words), "abc"])
    assert whole.context.shape == (2, 3 * LENGTH, WIDTH)
    for row, parts in enumerate((words, ["abc", "", ""])):
        torch.testing.assert_close(whole.context[row], torch.cat([one.encode([part]).context[0] for part in parts]))
    first = one.encode([words[0], "abc"])
    torch.testing.assert_close(one.encode([" ".join(words), "abc"]), first)  # the rest is cut
    torch.testing.assert_close(whole.pooled, first.pooled)


def test_embeddings_of_another_length_have_another_name(tmp_path: Path) -> None:
    digests = [encoders(tmp_path, "sd15", chunks).digest() for chunks in (1, 2, 3)]
    assert len(set(digests)) == 3


def test_captions_that_are_cut_are_counted(tmp_path: Path) -> None:
    short, exact, long, longer = "abc", "a" * ROOM, "a" * (ROOM + 1), "a" * (3 * ROOM)
    one = encoders(tmp_path, "sdxl", 1)
    assert one.cut([short, exact]) == []
    assert tell_of_cut(one, [short, exact], "captions") is None
    assert [(found.caption, found.tokens, found.kept) for found in one.cut([short, long, exact, longer])] == [
        (long, ROOM + 1, ROOM),
        (longer, 3 * ROOM, ROOM),
    ]
    told = tell_of_cut(one, [short, long, exact, longer], "captions")
    assert told is not None
    assert "2 of 4 captions have more than 9 tokens" in told
    assert "has 27. " in told
    assert encoders(tmp_path, "sdxl", 3).cut([longer]) == []


@pytest.mark.parametrize(("tokens", "proposed"), [(0, 75), (-75, 75), (77, 150), (149, 150), (226, 300)])
def test_what_is_no_whole_number_of_chunks_is_refused(tokens: int, proposed: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"multiple of 75.* got {tokens}: use {proposed}"):
        load_text_encoders(Pretrained(str(whole_model(tmp_path, "sd15"))), tokens)


def test_reading_the_encoders_prints_nothing_and_leaves_bars_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = whole_model(tmp_path / "model", "sd15")
    capsys.readouterr()
    load_text_encoders(Pretrained(str(source)))
    assert capsys.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
