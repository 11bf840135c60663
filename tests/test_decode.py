"""Decoding against PIL, for every kind of image that comes along."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.errors import DataError
from data.images import decode as decoding
from data.images.crops import DRAWS, Box, centre_crop, flipped, random_resized_crop
from data.images.decode import image_size, read_header, verify


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import sklearn.datasets

    return Image.fromarray(sklearn.datasets.load_sample_image("flower.jpg"))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data: bytes, box: Box, size: tuple[int, int], channels: int, **options) -> torch.Tensor:
    """One box of an image."""
    return decoding.decode(data, read_header(data, channels), [box], size, channels, **options)[0]


def whole(data: bytes, channels: int = 3) -> np.ndarray:
    """[H, W, C] without crop or resize."""
    size = image_size(data)
    image = decode(data, (0, 0, *size), size, channels)
    assert image.dtype == torch.uint8 and image.shape == (channels, *size)
    return image.permute(1, 2, 0).numpy()


def difference(a: np.ndarray, b: object) -> float:
    return float(np.abs(a.astype(float) - np.asarray(b, float).reshape(a.shape)).mean())


BOXES = [((0, 0, 427, 640), (224, 224)), ((13, 57, 300, 401), (224, 224)), ((100, 200, 60, 50), (96, 160))]


@pytest.mark.parametrize(("box", "size"), BOXES)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_resized_crops_match_those_of_pil(photo, form, box, size):
    options = {"quality": 90} if form != "PNG" else {}
    data = encoded(photo, form, **options)
    top, left, height, width = box
    crop = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC))
    found = decode(data, box, size, 3).permute(1, 2, 0).numpy()
    assert difference(found, expected) < 0.05 and np.abs(found.astype(int) - expected).max() <= 2


def test_crop_of_the_output_size_is_not_resampled(photo):
    found = decode(encoded(photo), (11, 22, 64, 48), (64, 48), 3)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(photo)[11:75, 22:70])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_images_come_out_upright(real_images, orientation):
    data = (real_images / f"large_photos/exif_orientation/Landscape_{orientation}.jpg").read_bytes()
    upright = (real_images / "large_photos/exif_orientation/Landscape_1.jpg").read_bytes()
    height, width = image_size(upright)
    assert image_size(data) == (height, width) and width > height
    small = decode(data, (0, 0, height, width), (60, 90), 3).numpy()
    assert difference(small, decode(upright, (0, 0, height, width), (60, 90), 3).numpy()) < 4
    box = (0, 0, height // 2, width // 2)  # Crops count in the upright image.
    assert difference(decode(data, box, (60, 90), 3).numpy(), decode(upright, box, (60, 90), 3).numpy()) < 4


def test_exif_rotated_png_comes_out_upright(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo, exif=exif)
    np.testing.assert_array_equal(whole(data), np.rot90(np.asarray(photo), -1))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_grey_and_colour_images_convert_to_one_or_three_channels(photo, form):
    grey = photo.convert("L")
    assert difference(whole(encoded(grey, form), 1), whole(encoded(grey, form), 3)[..., :1]) == 0
    colour = whole(encoded(grey, form), 3)
    assert (colour[..., 0] == colour[..., 2]).all()
    data = encoded(photo, form)
    assert difference(whole(data, 1), Image.open(io.BytesIO(data)).convert("L")) < 0.6


def test_alpha_channel_is_dropped(photo):
    rgba = photo.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(photo.size))
    np.testing.assert_array_equal(whole(encoded(rgba)), np.asarray(photo))
    grey = photo.convert("L")
    la = Image.merge("LA", (grey, grey))
    np.testing.assert_array_equal(whole(encoded(la), 1)[..., 0], np.asarray(grey))


def test_palette_and_bitmap_images_decode_as_in_pil(photo):
    palette = photo.quantize(64)
    np.testing.assert_array_equal(whole(encoded(palette)), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(whole(encoded(palette, transparency=bytes([128] * 64))), palette.convert("RGB"))
    bits = photo.convert("1")
    np.testing.assert_array_equal(whole(encoded(bits), 1)[..., 0], np.asarray(bits.convert("L")))
    for form in ("BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(whole(encoded(photo, form)), np.asarray(photo))


def test_cmyk_jpegs_keep_their_colours(photo):
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    assert difference(whole(data), photo) < 4


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_images_are_scaled_to_8_bits(form):
    values = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    data = encoded(Image.fromarray(values), form)
    assert difference(whole(data, 1), np.round(values / 257)) == 0
    assert difference(whole(data, 3)[..., 1:2], np.round(values / 257)) == 0


def test_progressive_jpeg_decodes_as_in_pil(photo):
    data = encoded(photo, "JPEG", quality=90, progressive=True)
    np.testing.assert_array_equal(whole(data), np.asarray(Image.open(io.BytesIO(data))))


def test_jpegs_with_harmless_damage_are_decoded(photo):
    data = encoded(photo, "JPEG", quality=90)
    stray = data[:-2] + b"\x00\x11\x22" + data[-2:]
    assert difference(whole(stray), whole(data)) < 0.1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_truncated_image_raises_data_error(photo, form):
    data = encoded(photo, form)
    for length in (len(data) // 2, len(data) // 3, 40):
        with pytest.raises(DataError):
            verify(data[:length])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"no image", bytes(1000)])
def test_bytes_that_are_no_image_raise_data_error(data):
    with pytest.raises(DataError, match="bytes are"):
        image_size(data)


def test_image_above_the_pixel_limit_raises_data_error(photo):
    data = bytearray(encoded(photo, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(DataError, match="65535x65535 pixels are above the limit"):
        image_size(bytes(data))


# Boxes


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_random_crop_lies_inside_the_image_with_area_and_aspect_in_range(height, width, seed):
    u = np.random.default_rng(seed).random(DRAWS).tolist()
    top, left, h, w = random_resized_crop(height, width, u, (0.2, 1.0))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0
    if min(height, width) > 100 and 0.7 < height / width < 1.4:
        assert 0.19 < h * w / (height * width) <= 1 and 0.74 < w / h < 1.36


def test_random_crops_have_the_distribution_of_torchvision():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(1, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    draws = np.random.default_rng(0).random((4000, DRAWS)).tolist()
    ours = np.array([random_resized_crop(375, 500, u) for u in draws])
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), rtol=0.06)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.06)
    assert abs(np.mean([flipped(u) for u in draws]) - 0.5) < 0.03


def test_random_crop_of_an_extreme_aspect_falls_back_to_the_centre():
    assert random_resized_crop(10, 1000, [0.99] * DRAWS) == (0, 493, 10, 13)
    assert random_resized_crop(1000, 12, [0.99] * DRAWS) == (492, 0, 16, 12)


def test_centre_crop_has_the_aspect_of_the_output():
    assert centre_crop(375, 500, (224, 224)) == (0, 62, 375, 375)
    assert centre_crop(400, 400, (224, 224), keep=0.875) == (25, 25, 350, 350)
    assert centre_crop(375, 500, (100, 200)) == (62, 0, 250, 500)
    assert centre_crop(1, 1, (224, 100)) == (0, 0, 1, 1)
