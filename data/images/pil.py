"""PIL: reads PNG, WebP, BMP, TIFF, PPM, and the JPEGs that jpeg.py does not.

`pixels` returns images as stored, for decode.py to turn, but TIFF upright; `picture` turns all upright.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from data.errors import FORMAT_ERRORS, DataError
from data.images import arrays
from data.images.arrays import TYPES, with_bits
from data.images.jpeg import read_orientation

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
# decode.MAX_PIXELS is the limit for all formats; PIL would warn of its own inside Image.open.
Image.MAX_IMAGE_PIXELS = None
# By default PIL refuses a PNG with a text of 1 MB, such as the workflow that image generators add.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
WIDTH, HEIGHT, BITS, PHOTOMETRIC, PLANES, EXTRA, NUMBER = 256, 257, 258, 262, 284, 338, 339  # tags of a TIFF
UNSIGNED = (1, 4)  # values of NUMBER
NUMBERS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex int", 6: "complex"}
LUMA = np.array([19595, 38470, 7471], np.uint32)  # of 65536, as `convert("L")` has them


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[ImageFile]:
    """Opens an image within the block; ignores what PIL only warns of, such as a broken EXIF block.

    Raises DataError if it is not an image or is damaged, even if PIL notices that only within the block.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except FORMAT_ERRORS as error:
            _refuse_channels(data)
            reason = "are no image of a known format" if "identify" in str(error) else f"are damaged ({error})"
            raise DataError(f"its {len(data)} bytes {reason}") from None
        with image:
            try:
                _check_type(image)
                yield image
            except FORMAT_ERRORS as error:
                _refuse_channels(data)
                raise DataError(f"the {image.format} image cannot be decoded ({error})") from None


def image_size(data: bytes) -> tuple[int, int, int]:
    """Returns (height, width, EXIF orientation) of what `pixels` returns, from the header. PIL turns a TIFF itself."""
    with opened(data) as image:
        orientation = read_orientation(image.getexif)
        if not isinstance(image, TiffImageFile):
            return image.height, image.width, orientation
        height, width = image.tag_v2[HEIGHT], image.tag_v2[WIDTH]
    return (width, height, 1) if orientation >= 5 else (height, width, 1)


def pixels(data: bytes, channels: int, bits: int | None = 8) -> np.ndarray:
    """Decodes the image as stored, but a TIFF upright: uint16 [height, width, channels], or uint8.

    channels  1 (luma) or 3 (RGB); with any other number the channels stay as in the file
    bits      8: colours of 16 bits become uint8, their upper 8 bits (16-bit grey stays as it is); None: as in the file

    Raises DataError if it cannot be decoded.
    """
    with opened(data) as image:
        if _needs_tifffile(image, bits):
            return _choose_channels(arrays.pixels(data), channels, _colours(image))
        if bits != 8 and has_16_bits(image) and not image.mode.startswith("I"):
            return _choose_channels(_decode_16(image, data), channels, _colours(image))
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
            return np.repeat(_grey(image)[..., None], 3 if channels == 3 else 1, axis=2)
        mode = {1: "L", 3: "RGB"}.get(channels, image.mode)
        values = np.array(_without_palette(image).convert(mode))
    return values.reshape(*values.shape[:2], -1)


def has_16_bits(image: ImageFile) -> bool:
    """Returns whether an image that is not loaded yet has 16 bits per value."""
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITS, (1,))) == 16
    _, layout, maximum = _coding(image)
    return image.mode.startswith("I") or ";16" in layout or maximum > 255


def picture(data: bytes, mode: str | None = None, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes the whole image, upright.

    mode      "L" or "RGB"; None keeps grey images grey and converts all others to RGB
    at_least  (width, height) that suffice: a large JPEG is then decoded at 1/2, 1/4 or 1/8

    Raises DataError if it cannot be decoded.
    """
    with opened(data) as image:
        turn = read_orientation(image.getexif)
        if _needs_tifffile(image):
            values = _choose_channels(arrays.pixels(data), 3, _colours(image))
            return Image.fromarray(with_bits(values, 8)).convert(mode or "RGB")
        if at_least:
            width, height = at_least
            image.draft(None, (height, width) if turn >= 5 else (width, height))
        profile = image.info.get("icc_profile") if image.mode in ("L", "RGB") else None
        image.load()
        upright = ImageOps.exif_transpose(image) if turn > 1 else image
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        if image.mode.startswith("I"):
            upright = Image.fromarray(with_bits(_grey(upright), 8))
        found = _without_palette(upright).convert(mode or ("L" if grey else "RGB"))
    found.info = {"icc_profile": profile} if profile else {}
    return found


def _refuse_channels(data: bytes) -> None:
    """Raises DataError if what PIL could not read is a TIFF for arrays.py."""
    if data.startswith(arrays.TIFF) and (channels := arrays.channels_of(data)):
        raise DataError(
            f"its {channels} channels are not grey, RGB, RGBA or CMYK: model.in_channels={channels} reads them"
        ) from None


def _check_type(image: ImageFile) -> None:
    """Raises DataError unless the values are unsigned integers of at most 16 bits: PIL would clip them."""
    if isinstance(image, TiffImageFile):
        number, bits = image.tag_v2.get(NUMBER, (1,))[0], max(image.tag_v2.get(BITS, (1,)))
        if number not in UNSIGNED or bits not in (1, 2, 4, 8, 16):
            raise DataError(f"the image is of {NUMBERS.get(number, 'unknown')}{bits}; {TYPES}")
    elif image.mode == "F":
        raise DataError(f"the image is of float32; {TYPES}")


def _needs_tifffile(image: ImageFile, bits: int | None = 8) -> bool:
    """Returns whether it is a TIFF with a plane of 16 bits per channel: PIL takes those for 8 bits, if uncompressed."""
    if not isinstance(image, TiffImageFile) or image.tag_v2.get(PLANES) != 2 or image.mode.startswith("I"):
        return False
    return has_16_bits(image) and (bits != 8 or ";16" not in _coding(image)[1])


def _colours(image: ImageFile) -> str:
    """Returns the mode of the image, RGBa if its colours are stored multiplied by its alpha."""
    associated = isinstance(image, TiffImageFile) and image.tag_v2.get(EXTRA, ())[:1] == (arrays.ASSOCIATED,)
    return "RGBa" if associated and image.mode == "RGBA" else image.mode


def _coding(image: ImageFile) -> tuple[str, str, int]:
    """Returns codec, layout of the stored values, and for PPM their maximum, of an image that is not loaded yet."""
    if not image.tile:  # WebP
        return "", "", 0
    codec, _, _, arguments = image.tile[0]
    layout, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    return codec, str(layout), rest[0] if codec.startswith("ppm") else 0


def _decode_16(image: ImageFile, data: bytes) -> np.ndarray:
    """Decodes colours of 16 bits, of which PIL returns the upper 8: uint16 [height, width, channels]."""
    codec, layout, maximum = _coding(image)
    if codec.startswith("ppm"):
        body, count = data[image.tile[0].offset :], image.height * image.width * 3
        plain = codec == "ppm_plain"
        values = np.array(body.split()[:count], np.uint32) if plain else np.frombuffer(body, ">u2", count)
        values = (np.minimum(values, maximum).astype(np.uint32) * 65535 + maximum // 2) // maximum
        return values.astype(np.uint16).reshape(image.height, image.width, 3)
    channels, _, order = layout.partition(";16")
    if channels == "LA":  # two values of 16 bits are decoded as four of 8
        return _decode_as(data, "RGBA", "RGBA").view(">u2").astype(np.uint16)
    channels = channels.upper()  # RGBa would be divided by its alpha
    if channels not in ("RGB", "RGBX", "RGBA", "CMYK"):
        raise DataError(f"its 16 bits of {image.mode} ({layout}) are not read: save it as RGB, or set data.bits=8")
    # PIL takes the first or the second of two bytes, by the byte order that it is told.
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    upper, lower = (_decode_as(data, f"{channels};16{byte}", image.mode) for byte in ("LB" if little else "BL"))
    return upper.astype(np.uint16) << 8 | lower


def _decode_as(data: bytes, layout: str, mode: str) -> np.ndarray:
    """Decodes the image as if its values were stored in another layout of PIL's, to [height, width, channels]."""
    with opened(data) as image:
        image._mode = mode
        image.tile = [
            tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
            for tile in image.tile
        ]
        return np.array(image)


def _choose_channels(values: np.ndarray, channels: int, mode: str) -> np.ndarray:
    """Returns luma or RGB of uint16 [height, width, C] in a mode of PIL, or all of its channels. Drops alpha."""
    if channels not in (1, 3):
        return values
    if mode == "CMYK":
        light = 65535 - values.astype(np.uint32)
        values = ((light[..., :3] * light[..., 3:] + 32767) // 65535).astype(np.uint16)
    elif mode == "RGBa":
        alpha = np.maximum(values[..., 3:], 1).astype(np.uint32)
        values = np.minimum((values[..., :3].astype(np.uint32) * 65535 + alpha // 2) // alpha, 65535).astype(np.uint16)
    if values.shape[2] < 3:
        return np.repeat(values[..., :1], channels, axis=2)
    if channels == 3:
        return np.ascontiguousarray(values[..., :3])
    luma = (values[..., :3].astype(np.uint32) * LUMA).sum(axis=2, dtype=np.uint32)
    return ((luma + 32768) >> 16).astype(np.uint16)[..., None]


def _grey(image: Image.Image) -> np.ndarray:
    """Returns 16-bit grey as uint16 [height, width]."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535).astype(np.uint16)
    inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0  # PIL heeds it for 8 bits only
    return 65535 - values if inverted else values


def _without_palette(image: Image.Image) -> Image.Image:
    # `convert("RGB")` would warn of the transparency.
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
