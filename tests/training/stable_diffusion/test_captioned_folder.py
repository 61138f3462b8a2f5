from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps

from slicemod.training.commands.fit_command import fit
from slicemod.training.common.checkpoints import read_safetensors, write_safetensors
from slicemod.training.stable_diffusion.aspect_buckets import (
    MOST_RATIO,
    MOST_RESOLUTION,
    Bucket,
    nearest_bucket,
    plan_buckets,
)
from slicemod.training.stable_diffusion.captioned_folder import CaptionedFolder
from slicemod.training.stable_diffusion.captioned_images import Crop, covering_size, find_captioned_images, read_crop
from slicemod.training.stable_diffusion.frozen_stages import FrozenStages, LatentDistribution
from slicemod.training.stable_diffusion.pretrained import Pretrained
from slicemod.user_error import UserError
from tests.training.tiny_stable_diffusion import (
    LetterEncoders,
    tiny_config,
    write_config,
    write_images,
    write_tiny_model,
)


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
    assert "sun.txt cannot be read: expected UTF-8, or UTF-16" in reasons["sun.png"]
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


def cached_latents(images: Path) -> Path:
    """A file of the cache that has the latents of an image."""
    files = sorted((images.parent / "cache").rglob("*.safetensors"))
    return next(file for file in files if "mean" in read_safetensors(file)[0])


def test_a_damaged_entry_is_named_and_computed_again(
    images: Path, stages: FrozenStages, capsys: pytest.CaptureFixture[str]
) -> None:
    data(images).fill_cache(stages, progress=False)
    entry = cached_latents(images)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-7])
    data(images).fill_cache(stages, progress=False)
    assert str(entry) in capsys.readouterr().err
    assert entry.read_bytes() == whole


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
            numbers += batch["numbers"]
        assert len(files) == len(set(files)) == 4, epoch
        assert not held_out & set(files)
        seen.append(files)
    assert sorted(numbers) == list(range(3 * 4))
    assert len({tuple(files) for files in seen}) > 1
    (validated,) = folder.val_dataloader()
    assert set(validated["files"]) == held_out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolution": 33}, "data.resolution must be a multiple of 8 pixels, got 33"),
        ({"resolution": 1_000_000_000}, "data.resolution must be from 1 to 16384 pixels, got 1000000000"),
        ({"resolution": 0}, "data.resolution must be from 1 to 16384 pixels, got 0"),
        ({"resolution": -512}, "data.resolution must be from 1 to 16384 pixels, got -512"),
        ({"bucket_step": 0}, "data.bucket_step must be from 1 pixel to data.resolution, 32, got 0"),
        ({"bucket_step": -8}, "data.bucket_step must be from 1 pixel"),
        ({"bucket_step": 64}, "data.bucket_step must be from 1 pixel to data.resolution, 32, got 64"),
        ({"max_ratio": 0.5}, "data.max_ratio must be from 1 to 100, got 0.5"),
        ({"max_ratio": math.nan}, "data.max_ratio must be from 1 to 100, got nan"),
        ({"max_ratio": math.inf}, "data.max_ratio must be from 1 to 100, got inf"),
        ({"batch_size": 0}, "data.batch_size must be a whole number of at least 1, got 0"),
        ({"crops": 1_000_000_000}, "data.crops must be a whole number from 1 to 1000, got 1000000000"),
        ({"val_count": -1}, "data.val_count must be a whole number of at least 0, got -1"),
        ({"shuffle_seed": 2**64}, "data.shuffle_seed must be a whole number from 0 to 4294967295"),
        ({"val_count": 5}, "data.val_count must leave images to train on, got 5 of 5"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes: dict[str, object], named: str, images: Path) -> None:
    with pytest.raises(UserError, match=named):
        data(images, **changes).find(progress=False)


def test_settings_are_checked_before_a_model_is_read(images: Path, tmp_path: Path) -> None:
    config = tiny_config("sd15_full.yaml", tmp_path / "no model", images, data={"resolution": 1_000_000_000})
    with pytest.raises(UserError, match=r"data\.resolution must be from 1 to 16384 pixels"):
        fit(["fit", "--config", write_config(tmp_path, config)])


def captioned(folder: Path, **pictures: Image.Image) -> Path:
    """A folder of pictures as PNG files, each with its name as caption."""
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    return folder


def test_images_of_linked_folders_are_used_with_the_captions_of_either_path(tmp_path: Path) -> None:
    away = captioned(tmp_path / "away", sea=Image.new("RGB", (3, 5)))
    folder = captioned(tmp_path / "images", cat=Image.new("RGB", (3, 5)))
    (folder / "linked").symlink_to(away)
    (folder / "loop").symlink_to(folder)
    found = find_captioned_images(folder, progress=False)
    assert [(image.path, image.caption) for image in found.images] == [
        (folder / "cat.png", "cat"),
        (folder / "linked" / "sea.png", "sea"),
    ]
    assert not found.skipped
    lines = [{"file_name": "linked/sea.png", "text": "the sea"}, {"file_name": "loop/cat.png", "text": "the cat"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = find_captioned_images(folder, progress=False)
    assert [image.caption for image in found.images] == ["the cat", "the sea"]
    assert not found.skipped


def test_files_of_other_kinds_that_are_pictures_are_named(images: Path) -> None:
    Image.new("RGB", (5, 7)).save(images / "scan.tiff")
    Image.new("RGB", (5, 7), "red").save(images / "CAT.GIF", format="GIF")
    (images / "CAT.txt").write_text("a red cat", encoding="utf-8")
    Image.new("F", (5, 7)).save(images / "depth.png", format="TIFF")
    (images / "depth.txt").write_text("far", encoding="utf-8")
    (images / "link.png").symlink_to("gone.png")
    (images / "link.txt").write_text("gone", encoding="utf-8")
    found = find_captioned_images(images, progress=False)
    assert "CAT.GIF" in {image.path.name for image in found.images}
    reasons = {path.name: reason for path, reason in found.skipped}
    assert set(reasons) == {"scan.tiff", "depth.png", "link.png"}
    assert reasons["scan.tiff"] == "expected .jpg, .jpeg, .png, .webp, .gif, .bmp, got .tiff"
    assert "its mode is F" in reasons["depth.png"]
    assert "No such file" in reasons["link.png"]


def test_the_time_for_metadata_does_not_grow_with_lines_times_images(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{number}.png", "text": "gone"}) for number in range(4_001)]
    Image.init()  # which takes its time once
    taken = []
    for images in (1, 401):
        folder = tmp_path / str(images)
        folder.mkdir()
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
        for number in range(images):
            (folder / f"{number}.png").touch()
        started = time.process_time()
        with pytest.raises(UserError, match="found none"):
            find_captioned_images(folder, progress=False)
        taken.append(time.process_time() - started)
    assert taken[1] < 2.5 * taken[0]


@pytest.mark.parametrize(
    ("size", "bucket"), [((40, 31), Bucket(24, 40)), ((31, 43), Bucket(24, 16)), ((5, 7), Bucket(32, 24))]
)
def test_a_crop_is_that_of_the_resized_image(size: tuple[int, int], bucket: Bucket, tmp_path: Path) -> None:
    picture = Image.effect_noise(size, 80).convert("RGB")
    (image,) = find_captioned_images(captioned(tmp_path / "one", noise=picture), progress=False).images
    height, width = covering_size(image, bucket)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    for top, left in {(0, 0), (height - bucket.height, width - bucket.width)}:
        cut = (read_crop(image, bucket, Crop(top, left, flipped=False)) + 1) * 127.5
        expected = resized[top : top + bucket.height, left : left + bucket.width]
        assert np.abs(cut.permute(1, 2, 0).round().numpy() - expected).max() <= 1


def test_a_long_strip_is_cut_before_it_is_enlarged(tmp_path: Path) -> None:
    strip = Image.new("RGB", (20_011, 11), "black")
    strip.paste("white", (10_006, 0, 20_011, 11))
    (image,) = find_captioned_images(captioned(tmp_path / "one", strip=strip), progress=False).images
    bucket = Bucket(384, 640)
    height, width = covering_size(image, bucket)
    assert (height, width) == (384, 698_566)
    started = time.process_time()
    pixels = read_crop(image, bucket, Crop(0, (width - bucket.width) // 2, flipped=False))
    assert time.process_time() - started < 1  # all of it is 800 MB of pixels
    assert pixels.shape == (3, 384, 640)
    assert pixels[..., :250].max() < -0.9
    assert pixels[..., -250:].min() > 0.9


def test_images_that_are_much_enlarged_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"dot": (1, 1), "line": (40, 3), "small": (15, 15), "fair": (16, 16), "large": (64, 64), "tiny": (5, 5)}
    folder = captioned(tmp_path / "images", **{name: Image.new("RGB", size) for name, size in sizes.items()})
    several = data(folder)
    several.find(progress=False)
    several.find(progress=False)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("4 of 6 images are enlarged by more than 2 times and will look blurred: ")
    places = [told.index(name) for name in ("dot.png (1x1 pixels, 32 times)", "line.png (40x3", "tiny.png (5x5")]
    assert places == sorted(places)
    assert "tiny.png (5x5 pixels, 6.4 times) and 1 more." in told
    assert "fair" not in told


@pytest.mark.parametrize(("size", "left"), [((64, 33), 1), ((33, 64), 0)])
def test_time_ids_of_a_mirrored_crop_are_of_the_mirrored_image(
    size: tuple[int, int], left: int, tmp_path: Path, stages: FrozenStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an autoencoder whose latents are the pixels
    monkeypatch.setattr(stages, "encode_images", lambda pixels: LatentDistribution(pixels, torch.ones_like(pixels)))
    folder = data(captioned(tmp_path / "one", noise=Image.effect_noise(size, 80)), flip=True, crops=3, max_ratio=1)
    folder.find(progress=False)
    (image,) = folder.train_images
    with Image.open(image.path) as picture:
        turned = captioned(tmp_path / "twin", noise=ImageOps.mirror(picture.convert("RGB")))
    (twin,) = find_captioned_images(turned, progress=False).images
    bucket = folder.bucket(image)
    folder.fill_cache(stages, progress=False)
    loader = folder.train_dataloader()
    lefts, seen_mirrored = set(), set()
    for _ in range(6 * folder.variants):  # epochs, each of which draws a variant
        for batch in loader:
            _, _, top, seen_left, _, _ = map(int, batch["time_ids"][0])
            # what is seen is what the image, or one that lies mirrored on disk, shows at that place
            there = [read_crop(on_disk, bucket, Crop(top, seen_left, flipped=False)) for on_disk in (image, twin)]
            is_plain, is_mirrored = ((batch["mean"][0] - pixels).abs().max() <= 2.1 / 127.5 for pixels in there)
            assert is_plain or is_mirrored
            lefts.add(seen_left)
            seen_mirrored.add(bool(is_mirrored))
    assert seen_mirrored == {False, True}
    assert (len(lefts) > 2) == bool(left)


def test_a_cached_file_with_other_tensors_ends_a_run_in_a_paragraph(images: Path, stages: FrozenStages) -> None:
    folder = data(images)
    folder.fill_cache(stages, progress=False)
    entry = cached_latents(images)
    write_safetensors(entry, {"mean": torch.zeros(4, 3, 3), "std": torch.zeros(4, 3, 3)}, {})
    with pytest.raises(UserError, match=re.escape(str(entry))):
        list(folder.train_dataloader())
    data(images).fill_cache(stages, progress=False)
    assert sum(len(batch["files"]) for batch in folder.train_dataloader()) == 5


def test_latents_that_are_not_finite_are_not_kept(images: Path, stages: FrozenStages) -> None:
    with torch.no_grad():
        stages.autoencoder.encoder.conv_in.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"latents of .*cat\.png: expected finite numbers"):
        data(images).fill_cache(stages, progress=False)
    kept = list((images.parent / "cache").rglob("*.safetensors"))
    assert len(kept) == 6  # the captions and the empty one


def test_buckets_of_the_largest_numbers_are_planned_at_once() -> None:
    started = time.process_time()
    buckets = plan_buckets(MOST_RESOLUTION, 64, MOST_RATIO)
    assert time.process_time() - started < 1
    assert max(bucket.width / bucket.height for bucket in buckets) > 90
