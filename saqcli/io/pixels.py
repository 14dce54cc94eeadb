"""From whatever numbers an image holds to the 8 bits that a network's preprocessing starts from.

Pillow converts numbers above 255 by clipping and fractions by truncation, so that TIFFs of 16 or 32 bits, or of floats,
turn white or black. Here they are read by their range, each image by itself:

===================  ==========================================================================================
declared bits        16-bit PNG, PGM and TIFF, 12-bit TIFF: white is the largest number of that many bits
32-bit integers      white is 255 if nothing is above that, or else 65535
floats               white is 1 if nothing is above that, or else 255
===================  ==========================================================================================

What these leave open is refused: negative or larger numbers, NaN, and an image whose largest number is not zero and
below a sixteenth of white. It may be dark, or of another range, and would come out black.
"""

from typing import Any

import numpy as np
from PIL import Image

DARKEST = 16  # the largest number of an image is at least white over this
_ROUNDING = 1e-4  # by which a float may pass white, relative

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_mode(image: Image.Image, mode: str, *, exif_transpose: bool = False) -> Image.Image:
    """The image in colour ``mode``, RGB or L, whatever numbers it holds.

    Args:
        image: open or in memory.
        mode: as Pillow names it.
        exif_transpose: turn it as its EXIF orientation says. Pillow turns a TIFF by itself.

    Raises:
        ValueError: nobody can tell what its numbers show.
    """
    whites, inverted = _declared(image)
    deep = _is_deep(image)
    image.load()
    if exif_transpose:
        image = _turned(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = _to_bytes(np.asarray(image), whites)
        image = Image.fromarray(255 - pixels if inverted else pixels)
    elif deep:
        _check_upper_half(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    elif image.mode in (
        "La",
        "RGBa",
    ):  # colours times transparency, from which Pillow goes one step at a time
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)


def _declared(image: Image.Image) -> tuple[tuple[int, ...], bool]:
    """The numbers that may be white by the file's own format; and whether black is that number instead.

    Raises:
        ValueError: a TIFF of signed 8-bit numbers, which Pillow reads as others.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    if signed and bits <= 8:
        raise ValueError("its numbers are signed 8-bit ones: save it unsigned")
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if signed and bits == 16:
        return (255, 2**15 - 1), inverted
    if sixteen and not signed:
        return (2**bits - 1,), inverted
    return ((1, 255) if image.mode == "F" else (255, 65535)), inverted


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits a colour, of which Pillow keeps the upper 8."""
    for tile in getattr(image, "tile", ()):
        codec, arguments = tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(each, str) and ";16" in each for each in arguments):
            return True
        if codec.startswith("ppm") and any(isinstance(each, int) and each > 255 for each in arguments):
            return True
    return False


def _to_bytes(
    pixels: "np.ndarray[Any, np.dtype[Any]]", whites: tuple[int, ...]
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Numbers as 8 bits, where the first of ``whites`` that nothing exceeds is 255."""
    low, high = pixels.min().item(), pixels.max().item()
    whole = pixels.dtype.kind in "iu"
    spare = 0 if whole else _ROUNDING
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has numbers that are NaN or infinite")
    if low < -spare:
        raise ValueError(f"its numbers reach down to {low:g}, below black: save it with 0 as black")
    white = next((each for each in whites if high <= each * (1 + spare)), None)
    if white is None:
        raise ValueError(
            f"its numbers reach {high:g}, so nobody can tell which one is white: save it with 8 bits"
        )
    if 0 < high * DARKEST < white:
        raise ValueError(
            f"its numbers reach {high:g} of {white}, so it is dark or has another range: save it with 8 bits"
        )
    if whole:
        return (pixels >> max(0, white.bit_length() - 8)).astype(np.uint8)
    return np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8)


def _check_upper_half(image: Image.Image) -> None:
    """Refuse an image whose 16-bit colours are all in the lowest sixteenth, of which the upper 8 bits show nothing."""
    bands = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name not in "AaX"]
    if max(int(np.asarray(band).max()) for band in bands) < 256 // DARKEST:
        raise ValueError(
            f"its 16-bit colours are below {65536 // DARKEST} of 65535, so it is dark or has another range: save it "
            "with 8 bits"
        )


def _turned(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says; as it is where that cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow raises on damaged metadata
        turn = None
    return image if turn is None else image.transpose(turn)
