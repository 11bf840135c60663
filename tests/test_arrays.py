"""Images of any number of channels, 8 or 16 bits: .npy, TIFF, PNG and PPM, from the file to the loss."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, PngImagePlugin

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.images import arrays
from data.images.arrays import turn
from data.images.decode import decode, has_16_bits, image_size, kind, read_header, verify
from data.pack.image_folder import find_images
from data.pack.pack import pack
from data.pack.writer import shrink
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


def png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, which PIL writes in grey only."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def pages(*values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for number, page in enumerate(values):
            writer.write(page, **{name: option[number] for name, option in options.items()})
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
    samples, classes, *_ = find_images(tmp_path / "in")
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


COLOURS = image(3)
PLANES = COLOURS.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "data",
    [
        png(COLOURS),
        png(np.dstack([COLOURS, image(1)])),
        tiff(COLOURS, photometric="rgb"),
        tiff(COLOURS, photometric="rgb", byteorder=">"),
        tiff(COLOURS, photometric="rgb", compression="zlib", predictor=True),
        tiff(COLOURS, photometric="rgb", bigtiff=True),
        tiff(np.dstack([COLOURS, image(1)]), photometric="rgb", extrasamples=["unassalpha"]),
        tiff(PLANES, photometric="rgb", planarconfig="separate"),
        tiff(PLANES, photometric="rgb", planarconfig="separate", compression="zlib"),
        b"P6\n56 40\n65535\n" + COLOURS.astype(">u2").tobytes(),
        b"P3\n56 40\n65535\n" + b" ".join(b"%d" % value for value in COLOURS.ravel()),
    ],
)
def test_colours_of_16_bits_keep_them_in_every_format(data):
    np.testing.assert_array_equal(whole(data, 3, 16), COLOURS)
    luma = whole(data, 1, 16)[..., 0].astype(int)
    assert abs(luma - COLOURS @ [0.299, 0.587, 0.114]).max() < 2
    assert abs(whole(data, 3, 8).astype(int) - COLOURS // 257).max() <= 1
    assert has_16_bits(data) and verify(data, bits=None).dtype == np.uint16 and verify(data).dtype == np.uint8


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_grey_of_16_bits_is_one_channel_where_several_are_wanted(channels):
    pgm = b"P5\n56 40\n65535\n" + image(1).astype(">u2").tobytes()
    for data in (png(image(1)), pgm, tiff(image(1)[..., 0])):
        for bits in (8, 16):
            with pytest.raises(DataError, match=f"it has 1 channels where model.in_channels={channels} are wanted"):
                whole(data, channels, bits)


def test_grey_of_16_bits_keeps_them_beside_alpha_and_if_white_is_zero():
    grey = image(1)
    for data in (png(grey), png(np.dstack([grey, image(2)[..., :1]])), tiff(65535 - grey, photometric="miniswhite")):
        np.testing.assert_array_equal(whole(data, 1, 16), grey)
        assert verify(data, bits=None).dtype == np.uint16


def test_cmyk_and_multiplied_alpha_of_16_bits_decode_as_those_of_8():
    for values, options in (
        (image(4), {"photometric": "separated"}),
        (
            np.dstack([COLOURS // 2, np.full((40, 56), 32768, np.uint16)]),
            {"photometric": "rgb", "extrasamples": ["assocalpha"]},
        ),
    ):
        both = [whole(tiff(v, **options), 3, 16) for v in (values, (values // 257).astype(np.uint8))]
        assert abs(both[0] / 257 - both[1] / 257).max() < 3


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "u4", "u8", "f2", "f4", "f8", "c8"])
@pytest.mark.parametrize("channels", [None, 3, 5])
def test_tiff_of_other_numbers_raises_data_error_with_its_type(dtype, channels):
    values = (image(channels or 1, np.uint8) % 100).astype(dtype)
    data = tiff(values if channels else values[..., 0], photometric="rgb" if channels == 3 else "minisblack")
    for read in (verify, kind, image_size, lambda data: read_header(data, channels or 1)):
        with pytest.raises(DataError, match=f"(of {np.dtype(dtype).name}|have 64 bits); uint8 and uint16 are read"):
            read(data)


def test_real_numbers_in_a_pfm_raise_data_error():
    with pytest.raises(DataError, match="of float32; uint8 and uint16 are read"):
        verify(b"Pf\n2 1\n-1.0\n" + np.zeros(2, "f4").tobytes())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("channels", "options"),
    [(2, {}), (2, {"extrasamples": ["unassalpha"]}), (4, {}), (4, {"photometric": "rgb"})],
)
@pytest.mark.parametrize("planar", [False, True])
def test_tiff_that_training_reads_is_accepted_by_pack_and_inspect(channels, options, dtype, planar):
    values = image(channels, dtype)
    options = {"photometric": "minisblack", **options, "planarconfig": "separate" if planar else "contig"}
    data = tiff(values.transpose(2, 0, 1) if planar else values, **options)
    np.testing.assert_array_equal(whole(data, channels, 8 * values.itemsize), values)
    assert verify(data).shape[:2] == kind(data)[2:] == image_size(data) == (40, 56)
    if kind(data).mode == f"{channels} channels" and options["photometric"] == "minisblack":
        with pytest.raises(DataError, match=f"its {channels} channels .* model.in_channels={channels} reads them"):
            whole(data, 3, 8)


@pytest.mark.parametrize("options", [{"imagej": True}, {"photometric": "minisblack"}, {"ome": True}])
def test_tiff_pages_are_channels_and_never_silently_the_first(options):
    values = image(5)
    data = tiff(values.transpose(2, 0, 1), **options)
    np.testing.assert_array_equal(whole(data, 5, 16), values)
    assert verify(data, bits=None).shape == (40, 56, 5) and kind(data).mode == "5 channels"
    for channels in (1, 3):
        with pytest.raises(DataError, match=f"5 channels where model.in_channels={channels} are wanted: its 5 pages"):
            whole(data, channels, 8)


def test_tiff_with_thumbnails_is_one_image_and_with_pages_of_colours_refused():
    colours = image(3, np.uint8)
    data = pages(colours, colours[::2, ::2], photometric=["rgb"] * 2, subfiletype=[0, 1])
    np.testing.assert_array_equal(whole(data, 3, 8), colours)
    with pytest.raises(DataError, match="2 pages of 3 channels"):
        verify(pages(colours, colours, photometric=["rgb"] * 2))


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint8), (3, np.uint16), (5, np.uint8)])
def test_tiff_is_turned_upright_once(channels, dtype, orientation):
    values = image(channels, dtype)
    options = {"photometric": "rgb" if channels == 3 else "minisblack", "planarconfig": "contig"}
    data = tiff(values, extratags=[(0x0112, "H", 1, orientation, True)], **options)
    upright = turn(values, orientation)
    np.testing.assert_array_equal(whole(data, channels, 8 * values.itemsize), upright)
    assert verify(data).shape == upright.shape and kind(data)[2:] == upright.shape[:2]


def test_lzw_tiff_is_read_by_pil_or_names_the_package_to_install():
    values, buffer = image(4, np.uint8), io.BytesIO()
    Image.fromarray(values, "RGBA").save(buffer, "TIFF", compression="tiff_lzw")
    np.testing.assert_array_equal(whole(buffer.getvalue(), 4, 8), values)
    data = bytearray(tiff(image(5), photometric="minisblack", planarconfig="contig", compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        place = file.pages[0].tags["Compression"].valueoffset
    data[place : place + 2] = b"\x05\0"
    with pytest.raises(DataError, match="pip install imagecodecs"):
        verify(bytes(data))


def test_channels_first_npy_is_named_as_such():
    for channels in (3, 5, 16):  # pack and inspect do not know how many are wanted
        for read in (verify, kind, image_size):
            with pytest.raises(DataError, match=rf"\[{channels}, 40, 56\], which looks like channels first"):
                read(npy(image(channels).transpose(2, 0, 1)))
    with pytest.raises(DataError, match=r"30 channels .* its shape \[5, 20, 30\] looks like channels first"):
        whole(npy(image(5, height=20, width=30).transpose(2, 0, 1)), 5, 16)


def test_png_with_megabytes_of_text_is_read():
    text, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    Image.fromarray(image(3, np.uint8)).save(buffer, "PNG", pnginfo=text)
    np.testing.assert_array_equal(verify(buffer.getvalue()), image(3, np.uint8))


@pytest.mark.parametrize("data", [png(COLOURS), png(image(1)), npy(image(5, np.uint8)), tiff(COLOURS)])
def test_16_bits_and_other_channels_are_never_shrunk_to_a_jpeg(data):
    assert shrink(data, 64, 90) is None
    with pytest.raises(DataError, match="pack it without --shorter-side"):
        shrink(data, 16, 90)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector.
def test_images_of_16_bits_are_reported_when_data_bits_is_8(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", {f"{i}.png": png(COLOURS) for i in range(4)})
    for bits, said in ((8, "0.png and perhaps other images have 16 bits: data.bits=8 keeps"), (16, "")):
        config = DataConfig(path=str(tmp_path / "x.tar"), workers=0, bits=bits)
        ShardDataModule(config, image_size=(16, 16), channels=3, seed=0, global_batch=4, micro_batch=4)
        err = capsys.readouterr().err
        assert said in err if said else "16 bits" not in err
    config = DataConfig(path=str(tmp_path / "x.tar"), workers=0, mode="stream", samples=4)
    ShardDataModule(config, image_size=(16, 16), channels=3, seed=0, global_batch=4, micro_batch=4).examples(1)
    assert "sample 0, and perhaps other images have 16 bits" in capsys.readouterr().err
