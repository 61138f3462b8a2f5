from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from slicemod.training.aspect_buckets import Bucket, nearest_bucket, plan_buckets
from slicemod.training.captioned_folder import CaptionedFolder
from slicemod.training.captioned_images import Crop, find_captioned_images, read_crop
from slicemod.training.frozen_stages import FrozenStages
from slicemod.training.pretrained import Pretrained
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import LetterEncoders, write_images, write_tiny_model


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five captioned images."""
    return write_images(tmp_path / "images")


@pytest.fixture
def stages(tmp_path: Path) -> FrozenStages:
    """A small random autoencoder and the letter encoders."""
    source = write_tiny_model(tmp_path / "sd15", "sd15")
    return FrozenStages(Pretrained(str(source)).load_autoencoder, lambda: LetterEncoders(pooled=True))


def data(images: Path, **changes: object) -> CaptionedFolder:
    settings = {"resolution": 32, "bucket_step": 8, "max_ratio": 1.5, "batch_size": 2} | changes
    return CaptionedFolder(str(images), str(images.parent / "cache"), **settings)  # type: ignore[arg-type]


def test_captions_come_from_text_files_and_from_metadata(images: Path) -> None:
    (images / "deeper").mkdir()
    Image.new("RGB", (31, 29), "red").save(images / "deeper" / "red.png")
    entry = {"file_name": "red.png", "text": "a red square"}
    (images / "deeper" / "metadata.jsonl").write_text(json.dumps(entry) + "\n\n")
    found = {image.path.name: image for image in find_captioned_images(images, progress=False).images}
    assert found["red.png"].caption == "a red square"
    assert (found["red.png"].height, found["red.png"].width) == (29, 31)
    assert found["sky.webp"].caption == "a photo of a sky"
    assert len(found) == 6


def test_what_cannot_be_used_is_left_out_by_name(images: Path) -> None:
    (images / "cat.png").write_bytes((images / "cat.png").read_bytes()[:60])
    (images / "dog.txt").unlink()
    (images / "sea.jpg").write_bytes(b"no picture")
    (images / "sun.txt").write_bytes(b"caf\xe9")  # Latin-1
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "text": "lost"}))
    found = find_captioned_images(images, progress=False)
    assert sorted(image.path.name for image in found.images) == ["sky.webp"]
    reasons = {path.name: reason for path, reason in found.skipped}
    assert set(reasons) == {"cat.png", "dog.png", "sea.jpg", "sun.png", "gone.png"}
    assert "sun.txt cannot be read: 'utf-8' codec" in reasons["sun.png"]
    assert "cannot be decoded" in reasons["cat.png"]
    assert "no caption, neither in metadata.jsonl nor in dog.txt" in reasons["dog.png"]
    assert "no such file" in reasons["gone.png"]


@pytest.mark.parametrize("line", ["{", '{"file_name": "cat.png"}', "[1]"])
def test_a_wrong_line_of_metadata_is_named(line: str, images: Path) -> None:
    (images / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2"):
        find_captioned_images(images, progress=False)


def test_a_folder_without_usable_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected images .* found none"):
        find_captioned_images(tmp_path, progress=False)
    with pytest.raises(UserError, match="expected a folder of images"):
        find_captioned_images(tmp_path / "missing", progress=False)


def test_images_are_turned_as_exif_says_and_transparency_becomes_white(tmp_path: Path) -> None:
    lying = Image.new("RGB", (20, 10), "black")
    lying.paste("white", (0, 0, 10, 10))  # its left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by a quarter clockwise
    lying.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    for name in ("turned", "clear"):
        (tmp_path / f"{name}.txt").write_text("")
    clear, turned = find_captioned_images(tmp_path, progress=False).images
    assert (turned.height, turned.width) == (20, 10)
    pixels = read_crop(turned, Bucket(20, 10), Crop(0, 0, flipped=False))
    assert pixels.shape == (3, 20, 10)
    assert pixels[:, :9].min() > 0.9
    assert pixels[:, 11:].max() < -0.9
    assert read_crop(clear, Bucket(20, 10), Crop(0, 0, flipped=False)).min() == 1


def test_a_crop_covers_its_bucket_and_can_be_mirrored(images: Path) -> None:
    image = find_captioned_images(images, progress=False).images[0]
    plain, mirrored = (read_crop(image, Bucket(24, 40), Crop(3, 0, flipped=flip)) for flip in (False, True))
    assert plain.shape == (3, 24, 40)
    assert torch.equal(plain.flip(-1), mirrored)
    assert not torch.equal(plain, mirrored)


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"), [(512, 64, 2.0), (1024, 64, 3.0), (32, 8, 1.5), (768, 64, 1.0)]
)
def test_buckets_have_about_one_area(resolution: int, step: int, ratio: float) -> None:
    buckets = plan_buckets(resolution, step, ratio)
    assert Bucket(resolution, resolution) in buckets
    for bucket in buckets:
        assert bucket.height % step == bucket.width % step == 0
        assert resolution**2 - step * max(bucket.height, bucket.width) < bucket.height * bucket.width <= resolution**2
        assert max(bucket.height, bucket.width) <= ratio * min(bucket.height, bucket.width)
        assert Bucket(bucket.width, bucket.height) in buckets
        assert nearest_bucket(bucket.height * 3, bucket.width * 3, buckets) == bucket


def test_the_cache_is_filled_once_and_only_for_what_changed(
    images: Path, stages: FrozenStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[torch.Size] = []
    encode = stages.encode_images
    monkeypatch.setattr(stages, "encode_images", lambda pixels: encoded.append(pixels.shape) or encode(pixels))  # type: ignore[func-returns-value]

    def fill(**changes: object) -> int:
        encoded.clear()
        data(images, **changes).fill_cache(stages, progress=False)
        return len(encoded)

    assert fill() == 5
    assert fill() == 0
    assert fill(flip=True) == 5
    assert fill(flip=True, crops=2) > 0
    assert fill(resolution=40) == 5
    (images / "cat.txt").write_text("another caption")
    assert fill() == 0
    Image.new("RGB", (32, 40)).save(images / "cat.png")
    assert fill() == 1


def test_another_autoencoder_has_latents_of_its_own(images: Path, stages: FrozenStages) -> None:
    data(images).fill_cache(stages, progress=False)
    count = len(list((images.parent / "cache").rglob("*.safetensors")))
    other = stages.autoencoder
    with torch.no_grad():
        other.encoder.conv_in.bias += 1
    assert isinstance(other, AutoencoderKL)
    changed = FrozenStages(lambda: other, lambda: LetterEncoders(pooled=True))
    data(images).fill_cache(changed, progress=False)
    assert len(list((images.parent / "cache").rglob("*.safetensors"))) == count + 5


def test_a_damaged_entry_is_named_and_computed_again(
    images: Path, stages: FrozenStages, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data(images)
    folder.fill_cache(stages, progress=False)
    before = {image.path.name: folder.cache.read(folder._latents_key(image, 0)) for image in folder.train_images}
    entry = folder.cache.path(folder._latents_key(folder.train_images[0], 0))
    entry.write_bytes(entry.read_bytes()[:-7])
    data(images).fill_cache(stages, progress=False)
    assert str(entry) in capsys.readouterr().err
    name = folder.train_images[0].path.name
    assert torch.equal(folder.cache.read(entry.stem)["mean"], before[name]["mean"])


def test_batches_hold_latents_embeddings_and_sizes_of_one_bucket(images: Path, stages: FrozenStages) -> None:
    folder = data(images, val_count=1, flip=True, crops=2)
    folder.fill_cache(stages, progress=False)
    held_out = {str(image.path) for image in folder.val_images}
    loader = folder.train_dataloader()
    numbers, seen = [], []
    for epoch in range(3):
        files = []
        for batch in loader:
            count, _, height, width = batch["mean"].shape
            assert batch["context"].shape == (count, 7, 24)
            assert batch["pooled"] is not None
            assert batch["pooled"].shape == (count, 12)
            assert batch["time_ids"][:, 4:].tolist() == [[height * 2, width * 2]] * count
            assert bool((batch["std"] > 0).all())
            files += batch["files"]
            numbers.append(batch["number"])
        assert len(files) == len(set(files)) == 4, epoch
        assert not held_out & set(files)
        seen.append(files)
    assert numbers == list(range(3 * len(loader)))
    assert len({tuple(files) for files in seen}) > 1
    (validated,) = folder.val_dataloader()
    assert set(validated["files"]) == held_out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolution": 33}, "data.resolution must be a multiple of 8 pixels, got 33"),
        ({"max_ratio": 0.5}, "data.max_ratio must be at least 1"),
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"val_count": 5}, "data.val_count must leave images to train on, got 5 of 5"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes: dict[str, object], named: str, images: Path) -> None:
    with pytest.raises(UserError, match=named):
        data(images, **changes).find(progress=False)
