"""Images of any number of channels, 8 or 16 bits: .npy and TIFF, from the file to the loss."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.images import arrays
from data.images.decode import decode, kind, read_header, verify
from data.pack.image_folder import find_images
from data.pack.pack import pack
from mae.models.pixels import Pixels
from tests.test_index import write_tar


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def image(channels: int, dtype: type = np.uint16, height: int = 40, width: int = 56) -> np.ndarray:
    values = np.random.default_rng(channels).random((height, width, channels))
    return (values * np.iinfo(dtype).max).astype(dtype)


def whole(data: bytes, channels: int, bits: int) -> np.ndarray:
    header = read_header(data, channels)
    size = header.height, header.width
    return decode(data, header, [(0, 0, *size)], size, channels, bits=bits)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_and_tiff_decode_to_the_written_values(channels, dtype):
    values, bits = image(channels, dtype), 8 * np.dtype(dtype).itemsize
    files = [npy(values), npy(values.astype(np.dtype(dtype).newbyteorder(">")))]
    if channels > 4:
        files += [tiff(values, photometric="minisblack", planarconfig="contig")]
        files += [tiff(values.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")]
        files += [tiff(values, photometric="minisblack", planarconfig="contig", compression="zlib")]
    for data in files:
        found = whole(data, channels, bits)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)
        assert verify(data).shape == values.shape
        assert kind(data)[2:] == (40, 56)


def test_values_are_scaled_between_8_and_16_bits():
    values = image(5)
    np.testing.assert_array_equal(whole(npy(values), 5, 8), np.round(values / 257))
    small = values.astype(np.uint8)
    np.testing.assert_array_equal(whole(npy(small), 5, 16), small.astype(np.uint16) * 257)


def test_16_bit_crops_are_resized_at_16_bit_precision():
    values = image(5)
    data = npy(values)
    header = read_header(data, 5)
    found = decode(data, header, [(4, 8, 32, 40)], (16, 20), 5, bits=16)[0]
    crop = torch.from_numpy(values[4:36, 8:48].astype(np.float32)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(crop, (16, 20), mode="bicubic", antialias=True)[0].clamp(0, 65535)
    assert found.dtype == torch.uint16 and (found.float() - expected).abs().max() <= 0.5


@pytest.mark.parametrize(
    ("data", "channels", "says"),
    [
        (npy(image(5))[:-1000], 5, "truncated"),
        (npy(image(5)), 4, "5 channels where model.in_channels=4"),
        (npy(image(5).astype(np.float32)), 5, "of float32; uint8 and uint16"),
        (npy(np.zeros((2, 3, 4, 5), np.uint8)), 5, "an image is"),
        (npy(np.asfortranarray(image(5))), 5, "Fortran order"),
        (arrays.NPY + b"\x01\x00\xff\xffgarbage", 5, "header is damaged"),
        (b"II*\0" + bytes(50), 5, "TIFF header is damaged"),
    ],
)
def test_unreadable_array_image_raises_data_error(data, channels, says):
    with pytest.raises(DataError, match=says):
        whole(data, channels, 8)


def test_npy_header_of_absurd_shape_raises_data_error_before_allocation():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 5)}
    )
    with pytest.raises(DataError, match="an image is"):
        read_header(header.getvalue(), 5)


def test_five_channel_16_bit_folder_packs_and_loads_as_normalised_batches(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        np.save(tmp_path / "in" / f"{i:02d}.npy", image(5, height=30 + i))
    samples, classes, _ = find_images(tmp_path / "in")
    pack(samples, tmp_path / "out", name="x", classes=classes)
    config = DataConfig(path=str(tmp_path / "out"), workers=2, bits=16, mean=[0.5] * 5, std=[0.25] * 5)
    data = ShardDataModule(config, image_size=(16, 24), channels=5, seed=0, global_batch=6, micro_batch=6)
    batches = list(data.train_loader(lambda: 0))
    assert all(batch["images"].dtype == torch.uint16 and batch["images"].shape == (6, 5, 16, 24) for batch in batches)
    images = torch.cat([Pixels([0.5] * 5, [0.25] * 5).normalise(batch["images"]) for batch in batches])
    assert abs(images.mean()) < 0.1 and images.min() > -2.1 and images.max() < 2.1


def test_foreign_tar_with_tiff_members_loads(tmp_path):
    member = tiff(image(6), photometric="minisblack", planarconfig="contig")
    write_tar(tmp_path / "x.tar", {f"{i}.tif": member for i in range(4)})
    config = DataConfig(path=str(tmp_path / "x.tar"), workers=0, mean=[0.5] * 6, std=[0.25] * 6)
    data = ShardDataModule(config, image_size=(16, 16), channels=6, seed=0, global_batch=4, micro_batch=4)
    assert next(iter(data.train_loader(lambda: 0)))["images"].shape == (4, 6, 16, 16)


def test_rgba_pngs_have_four_channels_when_four_are_wanted():
    buffer = io.BytesIO()
    Image.fromarray(image(4, np.uint8), "RGBA").save(buffer, "PNG")
    np.testing.assert_array_equal(whole(buffer.getvalue(), 4, 8), image(4, np.uint8))
    assert whole(buffer.getvalue(), 3, 8).shape[2] == 3
