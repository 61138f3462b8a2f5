"""The bytes of an image file as an upright RGB picture, whatever the file's mode."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PNG_BIT_DEPTH = 24  # the place of this byte in a PNG file


class PictureError(ValueError):
    """Bytes that are no picture, or one of a kind that has no certain look; the message does not name the file."""


def decoded_picture(content: bytes) -> Image.Image:
    """The picture in RGB, turned as EXIF says. Of an animation it is the first frame; what is transparent is white.

    Raises:
        PictureError: Pillow cannot decode it, or its mode does not say which value is white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's (a large picture, damaged EXIF) do not name the file
            return _decoded(content)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("it is no picture that Pillow knows") from error
    except Exception as error:  # on damaged bytes Pillow's readers raise what they like
        raise PictureError(f"it cannot be decoded: {error or type(error).__name__}") from error


def _decoded(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as opened:
        if opened.format == "EPS":
            raise PictureError("it is PostScript, a program that would have to be run")
        opened.load()
        _scale_transparent_key(opened, content)
        upright = ImageOps.exif_transpose(opened)
        upright.format = opened.format
        return opaque_rgb(upright)


def opaque_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, on white.

    Raises:
        PictureError: the mode does not say which value is white.
    """
    # Older versions of Pillow open 16-bit PNG files in mode I.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        picture = _grey_of_16_bits(picture)
    elif picture.mode in ("I", "F"):
        raise PictureError(
            f"its mode is {picture.mode} (32 bits a pixel), which does not say what value is white: save it with 8 or"
            " 16 bits"
        )
    elif picture.mode == "La":
        picture = picture.convert("LA")  # Pillow has no way from La to RGBA
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def _grey_of_16_bits(picture: Image.Image) -> Image.Image:
    """The upper 8 of the 16 bits, which are also what Pillow keeps of 16-bit colours."""
    values = np.asarray(picture)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    key = picture.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _scale_transparent_key(opened: Image.Image, content: bytes) -> None:
    """Brings the colour that a PNG file declares transparent to 8 bits, as Pillow has brought the pixels."""
    key = opened.info.get("transparency")
    if opened.format != "PNG" or opened.mode not in ("L", "RGB") or key is None:
        return
    depth = content[PNG_BIT_DEPTH]
    values = [value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in np.atleast_1d(key).tolist()]
    opened.info["transparency"] = values[0] if opened.mode == "L" else tuple(values)
