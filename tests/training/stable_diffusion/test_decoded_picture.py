from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from slicemod.training.stable_diffusion.decoded_picture import PictureError, decoded_picture, opaque_rgb

RED, WHITE = (255, 0, 0), (255, 255, 255)


def file_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, depth: int, colour: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of one row, of kinds that Pillow does not write; ``colour`` is PNG's colour type."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + key + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def pixels(picture: Image.Image) -> list[tuple[int, ...]]:
    """Of the first row."""
    assert picture.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(picture)[0].tolist()]


GREYS = np.array([[0, 0x4000, 0x8000, 0xC000, 0xFFFF]], dtype=np.uint16)
EIGHT_BITS = [(value,) * 3 for value in (0, 64, 128, 192, 255)]


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    assert pixels(decoded_picture(png(5, 16, 0, GREYS.astype(">u2").tobytes()))) == EIGHT_BITS
    for kind in ("<u2", ">u2"):
        picture = Image.fromarray(GREYS.astype(kind))
        assert picture.mode.startswith("I;16")
        assert pixels(opaque_rgb(picture)) == EIGHT_BITS
        assert pixels(decoded_picture(file_of(picture, "TIFF"))) == EIGHT_BITS
    older = Image.fromarray(GREYS.astype(np.int32))  # as older versions of Pillow open a PNG file
    older.format = "PNG"
    assert (older.mode, pixels(opaque_rgb(older))) == ("I", EIGHT_BITS)


@pytest.mark.parametrize(
    ("colour", "values", "expected"),
    [
        (2, [0xFFFF, 0x0123, 0x0000], (255, 1, 0)),
        (4, [0x8000, 0xFFFF], (128, 128, 128)),
        (4, [0x8000, 0x0000], WHITE),
        (6, [0xFFFF, 0x0000, 0x0000, 0xFFFF], RED),
        (6, [0xFFFF, 0x0000, 0x0000, 0x0000], WHITE),
    ],
)
def test_16_bit_colours_and_alpha_are_scaled_to_8_bits(
    colour: int, values: list[int], expected: tuple[int, ...]
) -> None:
    assert pixels(decoded_picture(png(1, 16, colour, struct.pack(f">{len(values)}H", *values)))) == [expected]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png(3, 16, 0, struct.pack(">3H", 0, 0x4000, 0xFFFF), struct.pack(">H", 0x4000)), [(0, 0, 0), WHITE, WHITE]),
        (png(2, 8, 0, bytes([64, 32]), struct.pack(">H", 64)), [WHITE, (32, 32, 32)]),
        (png(4, 2, 0, bytes([0b00_01_10_11]), struct.pack(">H", 1)), [(0, 0, 0), WHITE, (170, 170, 170), WHITE]),
        (png(2, 4, 0, bytes([0x0F]), struct.pack(">H", 0)), [WHITE, WHITE]),
        (png(2, 1, 0, bytes([0b01_000000]), struct.pack(">H", 0)), [WHITE, WHITE]),
        (png(2, 8, 2, bytes([255, 0, 0, 0, 0, 7]), struct.pack(">3H", 0, 0, 7)), [RED, WHITE]),
        (png(1, 16, 2, struct.pack(">3H", 0x1234, 0, 7), struct.pack(">3H", 0x1234, 0, 7)), [WHITE]),
    ],
    ids=["16-bit grey", "8-bit grey", "2-bit grey", "4-bit grey", "1-bit grey", "8-bit colour", "16-bit colour"],
)
def test_the_colour_that_a_png_declares_transparent_becomes_white(file: bytes, expected: list[tuple[int, ...]]) -> None:
    assert pixels(decoded_picture(file)) == expected


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (1, 1), colour)  # type: ignore[arg-type]


def palette(transparency: object = None, mode: str = "P") -> Image.Image:
    """One pixel of the second colour, red."""
    picture = Image.new("P", (1, 1), 1)
    picture.putpalette([0, 0, 255, *RED])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture.convert(mode)


def premultiplied(mode: str, colour: tuple[int, ...]) -> Image.Image:
    return plain(mode, colour).convert({"LA": "La", "RGBA": "RGBa"}[mode])


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (plain("1", 1), WHITE),
        (plain("1", 0), (0, 0, 0)),
        (plain("L", 77), (77, 77, 77)),
        (plain("LA", (77, 255)), (77, 77, 77)),
        (plain("LA", (77, 0)), WHITE),
        (plain("LA", (55, 51)), (215, 215, 215)),  # a fifth of 55, four fifths of 255
        (premultiplied("LA", (77, 255)), (77, 77, 77)),
        (premultiplied("LA", (77, 0)), WHITE),
        (palette(), RED),
        (palette(transparency=1), WHITE),
        (palette(transparency=0), RED),
        (palette(transparency=b"\xff\x00"), WHITE),
        (palette(mode="PA"), RED),
        (palette(transparency=1, mode="PA"), WHITE),
        (plain("RGB", RED), RED),
        (plain("RGBA", (*RED, 255)), RED),
        (plain("RGBA", (0, 0, 0, 0)), WHITE),
        (premultiplied("RGBA", (*RED, 255)), RED),
        (premultiplied("RGBA", (*RED, 0)), WHITE),
        (plain("RGBX", (*RED, 0)), RED),
        (plain("CMYK", (0, 255, 255, 0)), RED),
        (plain("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (plain("YCbCr", (255, 128, 128)), WHITE),
        (plain("YCbCr", (76, 85, 255)), (254, 0, 0)),
        (plain("HSV", (0, 255, 255)), RED),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_that_says_what_white_is_gives_its_picture(
    picture: Image.Image, expected: tuple[int, int, int]
) -> None:
    assert pixels(opaque_rgb(picture)) == [expected]


def test_a_file_in_lab_gives_its_colours() -> None:
    colour = (200, 90, 30)
    (read,) = pixels(decoded_picture(file_of(plain("RGB", colour).convert("LAB"), "TIFF")))
    assert np.abs(np.subtract(read, colour)).max() <= 2  # of rounding to 8 bits twice


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_white_is_refused_by_name(mode: str) -> None:
    file = file_of(plain(mode, 7), "TIFF")
    with pytest.raises(PictureError, match=f"its mode is {mode} .* does not say what value is white"):
        decoded_picture(file)


def test_no_mode_of_pillow_is_left_out() -> None:
    for mode in Image.MODES:
        picture = Image.new(mode, (2, 3))
        if mode in ("I", "F"):
            with pytest.raises(PictureError):
                opaque_rgb(picture)
        else:
            assert opaque_rgb(picture).mode == "RGB", mode


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(file)), "n_frames", 1) == 2
    assert set(pixels(decoded_picture(file))) == {RED}


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGBA"])
def test_exif_turns_pictures_of_every_mode(mode: str, orientation: int, turned: list[list[int]]) -> None:
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    stored = Image.fromarray(values.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.asarray(decoded_picture(file_of(stored, "PNG", exif=exif)))[..., 0].tolist() == turned


def test_a_program_is_not_run() -> None:
    with pytest.raises(PictureError, match="it is PostScript"):
        decoded_picture(file_of(plain("RGB", RED), "EPS"))


def test_what_is_no_picture_is_said_without_pillows_words() -> None:
    with pytest.raises(PictureError, match=r"^it is no picture that Pillow knows$"):
        decoded_picture(b"no picture")
    with pytest.raises(PictureError, match=r"^it cannot be decoded: "):
        decoded_picture(file_of(Image.effect_noise((64, 64), 50), "PNG")[:900])
