"""Decoding a part of a JPEG: the same pixels as all of it, for less work."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import DataError
from data.images import jpeg
from data.images.crops import DRAWS, random_resized_crop
from data.images.decode import DCT_SCALES, _dct_scale, _snap, decode, read_header


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import sklearn.datasets

    return Image.fromarray(sklearn.datasets.load_sample_image("flower.jpg"))


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


KINDS = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"restart_marker_rows": 1},
    {"optimize": True},
    {"progressive": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1, *DCT_SCALES])
def test_partial_decode_gives_the_pixels_of_a_whole_decode(photo, kind, scale):
    for image in (photo, photo.crop((0, 0, 333, 251)), photo.convert("L")):
        data = encoded(image, **kind)
        header = jpeg.parse(data)
        assert header is not None and (header.width, header.height) == image.size
        rows, columns = -(-image.height // scale), -(-image.width // scale)
        whole = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns)
        assert whole.shape == (rows, columns, 3)
        for bottom in (1, 7, 8, 16, 17, image.height // 2, image.height - 9, image.height):
            upper = jpeg.decode(data, header, "RGB", bottom, scale)
            assert len(upper) == rows or len(upper) * scale < bottom + 64
            np.testing.assert_array_equal(upper[: bottom // scale], whole[: bottom // scale])


def test_header_marks_all_but_progressive_jpegs_as_one_pass(photo):
    assert [jpeg.parse(encoded(photo, **kind)).one_pass for kind in KINDS] == [True] * 5 + [False]  # type: ignore


def test_partial_decode_of_real_photographs_gives_the_pixels_of_a_whole_decode(real_images):
    for path in sorted((real_images / "large_photos").rglob("*.jpg")):
        data = path.read_bytes()
        header = jpeg.parse(data)
        with Image.open(path) as image:
            assert header is not None and (header.width, header.height) == image.size
            assert header.orientation == image.getexif().get(0x0112, 1)
        half = header.height // 2
        whole = simplejpeg.decode_jpeg(data, "RGB")
        np.testing.assert_array_equal(jpeg.decode(data, header, "RGB", half)[:half], whole[:half])


def test_partial_decode_raises_only_for_damaged_rows_and_truncation(photo):
    data = encoded(photo)
    header = jpeg.parse(data)
    start = data.index(b"\xff\xda") + 14
    assert header is not None
    early = data[: start + 2000] + b"\xff\xd9" + data[start + 2000 :]
    with pytest.raises(ValueError):
        jpeg.decode(early, header, "RGB", 200)
    late = data[:-2000] + bytes(1000) + data[-1000:]
    np.testing.assert_array_equal(jpeg.decode(late, header, "RGB", 200)[:200], simplejpeg.decode_jpeg(data)[:200])
    with pytest.raises(ValueError, match="Premature end"):
        jpeg.decode(data[:-2000], header, "RGB", 200)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 600), st.integers(0, 255))
def test_parsing_a_broken_header_gives_none_or_a_valid_header(stray, at, value):
    whole = encoded(Image.new("RGB", (40, 30)), exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0\0\0")
    assert jpeg.parse(whole).orientation == 6  # type: ignore[union-attr]
    data = bytearray(whole)
    data[at % len(data)] = value
    for broken in (bytes(data), whole[:at], whole[: at % 40] + stray, b"\xff\xd8" + stray):
        header = jpeg.parse(broken)
        assert header is None or (header.height > 0 and header.width > 0 and header.orientation in range(1, 9))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2])
def test_crop_boxes_of_exif_rotated_jpegs_count_in_the_upright_image(orientation, scale):
    # A picture that is the same at any orientation would prove nothing.
    upright = Image.new("RGB", (320, 192))
    upright.paste((250, 10, 10), (0, 0, 160, 96))
    upright.paste((10, 250, 10), (160, 96, 320, 192))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what PIL has to do to store it so
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif, quality=98, subsampling=0)
    header = read_header(data)
    assert (header.height, header.width) == (192, 320) and header.jpeg is not None
    box = (32, 64, 128, 192)
    found = decode(data, header, [box], (128 // scale // 2, 192 // scale // 2), exact=scale == 1)[0]
    crop = upright.crop((64, 32, 256, 160)).resize((192 // scale // 2, 128 // scale // 2), Image.Resampling.BICUBIC)
    difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(crop))
    assert difference.mean() < 1.5


# Fidelity against PIL on real photographs.


def pil_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    # Horizontally first, as torch and most versions of PIL do; some versions begin with what is cheaper.
    crop = crop.resize((size, height), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(crop).astype(int)


@pytest.mark.parametrize("size", [(500, 375), (2250, 1500)])
def test_exact_crops_match_pil_and_fast_crops_are_close(real_images, size):
    differences: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for number, name in enumerate(["car_2164x1626", "leaf_3264x2448", "saw_2725x2225", "wisteria_3264x2448"]):
        with Image.open(real_images / "large_photos" / f"{name}.jpg") as original:
            data = encoded(original.convert("RGB").resize(size, Image.Resampling.LANCZOS), quality=92)
        image, header = Image.open(io.BytesIO(data)).convert("RGB"), read_header(data)
        draws = np.random.default_rng(number).random((3, DRAWS)).tolist()
        for u in draws:
            box = random_resized_crop(header.height, header.width, u)
            for exact in (True, False):
                # On multiples of 8, so that a fast box does not move.
                at = box if exact else tuple(edge // 8 * 8 for edge in box)
                found = decode(data, header, [at], (224, 224), exact=exact)[0].permute(1, 2, 0).numpy()
                differences[exact].append(np.abs(found - pil_crop(image, at, 224)))
    assert np.mean(differences[True]) < 0.05 and np.max(differences[True]) <= 2
    assert np.mean(differences[False]) < 0.3


@given(st.integers(900, 3000), st.integers(900, 3000), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_fast_crop_boxes_stay_inside_and_move_by_less_than_the_scale(height, width, seed):
    u = np.random.default_rng(seed).random(DRAWS).tolist()
    box = random_resized_crop(height, width, u)
    header = read_header(encoded(Image.new("L", (width, height))))
    scale = _dct_scale([box], (224, 224), 1)
    top, left, h, w = _snap(box, scale, header)
    assert min(h, w) // scale >= 2 * 224 or scale == 1
    assert all(edge % scale == 0 for edge in (top, left, h, w))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
    assert all(abs(a - b) <= scale for a, b in zip(box, (top, left, h, w), strict=True))


def test_jpeg_above_the_pixel_limit_raises_data_error(photo):
    data = bytearray(encoded(photo))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65535, 65535)
    with pytest.raises(DataError, match="above the limit"):
        read_header(bytes(data))
