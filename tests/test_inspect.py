"""Inspecting shards: what is counted, found out and drawn, and what is refused."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from data.index.index import open_shards
from data.inspect.__main__ import main
from data.inspect.contact_sheet import SIDE, describe, draw_sheet
from tests.processes import completed
from tests.test_index import write_tar


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two tars: 80 colour images of two classes and sizes, then 20 grey ones without labels."""
    noise = np.random.default_rng(0)
    files = {}
    for i in range(80):
        shape = (40, 60, 3) if i % 4 else (300, 200, 3)
        files[f"{i:03d}.png"] = encoded(noise.integers(0, 200, shape, np.uint8))
        files[f"{i:03d}.cls"] = str(i % 5 // 4).encode()
    write_tar(tmp_path / "in" / "a.tar", files)
    grey = {f"g{i}.jpg": encoded(noise.integers(0, 255, (30, 30), np.uint8), "JPEG") for i in range(20)}
    write_tar(tmp_path / "in" / "b.tar", grey)
    return tmp_path / "in"


def findings(folder: Path, *words: str) -> dict:
    file = folder.parent / "findings.json"
    main([str(folder), "--json", str(file), "--jobs", "1", *words])
    return json.loads(file.read_text())


def overwrite(folder: Path, sample: int, data: bytes) -> str:
    """Puts other bytes at the beginning of an image of an indexed tar; its key."""
    index = open_shards(folder)
    number, offset, size = index.locate(sample)
    with open(index.shards[number], "r+b") as file:
        file.seek(offset)
        file.write(data[:size])
    return index.key(sample)


def test_inspect_counts_samples_classes_formats_and_sizes(shards, capsys):
    found = findings(shards)
    said = capsys.readouterr().out
    assert (found["shards"], found["samples"], found["read"], found["decoded"]) == (2, 100, 100, 100)
    assert found["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert found["labels"] == {"0": 64, "1": 16} and found["unlabelled"] == 20
    assert found["formats"] == {"PNG": 80, "JPEG": 20} and found["modes"] == {"RGB": 80, "L": 20}
    assert found["shorter_sides"] == {
        "below 32": 20,
        "32 to 63": 60,
        "64 to 127": 0,
        "128 to 223": 20,
    }
    assert (found["smallest"], found["largest"], found["median_shorter_side"]) == ([30, 30], [300, 200], 40)
    assert found["corrupt"] == [] and found["duplicates"] == []
    assert "2 with 16 … 64 samples; 20 samples without a label" in said and "30x30 … 300x200" in said
    assert all(len(line.rstrip()) <= 80 for line in said.splitlines())


def test_inspect_mean_and_std_equal_those_of_the_pixels(tmp_path):
    noise = np.random.default_rng(1)
    images = [noise.integers(0, 40 * i + 60, (50, 70, 3), np.uint8) for i in range(4)]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.png": encoded(pixels) for i, pixels in enumerate(images)})
    found = findings(tmp_path / "in")
    values = np.stack(images).reshape(-1, 3) / 255
    np.testing.assert_allclose(found["mean"], values.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found["std"], values.std(axis=0), atol=1e-5)


def test_inspect_of_grey_images_gives_one_mean_and_std(tmp_path):
    write_tar(tmp_path / "in" / "x.tar", {"a.png": encoded(np.full((8, 8), 51, np.uint8))})
    found = findings(tmp_path / "in")
    np.testing.assert_allclose(found["mean"], [0.2], atol=1e-6)
    np.testing.assert_allclose(found["std"], [0], atol=1e-3)


def test_inspect_names_corrupt_samples_with_shard_and_reason(shards, capsys):
    no_image = overwrite(shards, 7, b"no image at all")
    damaged = overwrite(shards, 40, open_image(shards, 40)[:2000] + b"\xff" * 200_000)
    found = findings(shards, "--deep")
    assert [entry["key"] for entry in found["corrupt"]] == [no_image, damaged]
    assert all(entry["shard"].endswith("a.tar") and entry["reason"] for entry in found["corrupt"])
    assert found["decoded"] == 98
    said = capsys.readouterr().out
    assert f"a.tar:{no_image}: its " in said


def open_image(folder: Path, sample: int) -> bytes:
    index = open_shards(folder)
    number, offset, size = index.locate(sample)
    with open(index.shards[number], "rb") as file:
        return os.pread(file.fileno(), size, offset)


def test_inspect_finds_duplicate_images_across_shards(tmp_path):
    one, other = (encoded(np.full((8, 8, 3), value, np.uint8)) for value in (1, 2))
    write_tar(tmp_path / "in" / "a.tar", {"x.png": one, "y.png": other})
    write_tar(tmp_path / "in" / "b.tar", {"z.png": one, "w.png": one})
    found = findings(tmp_path / "in")
    assert [[place["key"] for place in group] for group in found["duplicates"]] == [["x", "z", "w"]]


def test_inspect_exits_with_1_for_corrupt_samples_only_if_strict(shards):
    overwrite(shards, 3, b"no image at all")
    findings(shards)
    with pytest.raises(SystemExit) as end:
        findings(shards, "--strict")
    assert end.value.code == 1


def test_inspect_decodes_500_samples_by_default_and_all_if_deep(tmp_path, capsys):
    image = encoded(np.zeros((4, 4), np.uint8))
    write_tar(tmp_path / "in" / "x.tar", {f"{i:04d}.png": image + bytes([i % 256, i // 256]) for i in range(700)})
    found = findings(tmp_path / "in")
    assert (found["read"], found["decoded"]) == (700, 500)
    assert "decoded: 500 (--deep: all)" in capsys.readouterr().out
    deep = findings(tmp_path / "in", "--deep", "--jobs", "2")
    assert (deep["read"], deep["decoded"]) == (700, 700)


def test_contact_sheet_shows_samples_and_greys_out_corrupt_ones(shards, tmp_path):
    overwrite(shards, 0, b"no image at all")
    findings(shards, "--sheet", str(tmp_path / "sheet.png"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000 and sheet.height > 1000
        pixels = np.asarray(sheet)
    assert (pixels[8:168, 8:168] == 128).all()  # The first sample cannot be decoded.
    assert pixels[300, :, :].std() > 10


def test_contact_sheet_shows_arrays(tmp_path):
    buffer, values = io.BytesIO(), np.full((160, 160, 5), 60000, np.uint16)
    values[..., 1:] = 0
    np.save(buffer, values)
    draw_sheet(open_shards(write_tar(tmp_path / "x.tar", {"a.npy": buffer.getvalue()})), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((88, 88)) == (255, 0, 0)


def test_inspect_of_a_data_set_covers_all_its_splits(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))
    main([str(real_images / "grocery"), "--json", str(tmp_path / "found.json"), "--jobs", "1"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["shards"] == 3 and len(found["labels"]) == 43 and found["formats"] == {"JPEG": found["samples"]}
    assert 0.3 < found["mean"][0] < 0.6 and 0.2 < found["std"][0] < 0.3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "does not exist"),
        (["broken.tar"], "is not a tar archive"),
        (["a.tar", "--sheet", "no/folder/x.png"], "--sheet no/folder/x.png cannot be written"),
        (["a.tar", "--json", "no/folder/x.json"], "--json no/folder/x.json cannot be written"),
    ],
)
def test_inspect_with_wrong_arguments_exits_with_2_and_an_error_line(tmp_path, words, says):
    write_tar(tmp_path / "a.tar", {"a.png": encoded(np.zeros((4, 4), np.uint8))})
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    ended = completed([sys.executable, "-m", "data.inspect", *words], tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("error: ") and says in ended.stderr


def test_inspect_reports_the_range_of_values_and_constant_images(tmp_path, capsys):
    noise = np.random.default_rng(2)
    deep = noise.integers(7, 4096, (20, 30), np.uint16)
    deep[0, :2] = 7, 4095
    files = {"deep.png": encoded(deep), "black.png": encoded(np.zeros((9, 9), np.uint8))}
    files["almost.png"] = encoded(np.pad(np.full((1, 1), 200, np.uint8), ((50, 0), (0, 40))))
    write_tar(tmp_path / "in" / "x.tar", files)
    found = findings(tmp_path / "in")
    assert found["ranges"] == {"8": [0, 200], "16": [7, 4095]}
    assert [place["key"] for place in found["constant"]] == ["black"]
    np.testing.assert_allclose(found["mean"], [(deep.mean() / 65535 + 200 / 255 / (51 * 41)) / 3], atol=1e-6)
    said = " ".join(capsys.readouterr().out.split())
    assert "16 bits, 7 … 4,095 of 0 … 65,535: set data.bits=16 (8 would leave 17 levels)" in said
    assert "1 images of one colour x.tar:black" in said


def test_contact_sheet_cuts_long_keys_and_names_apart_and_stretches_16_bits(tmp_path):
    font = ImageFont.load_default(11)
    long = "a_folder_of_some_camera_with_a_long_name/IMG_00017"
    key, name = describe(long, "a_class_with_a_name_as_long_as_the_key", font).split("\n")
    assert key.startswith("…") and key.endswith("/IMG_00017") and name.startswith("[a_class_with") and name[-2:] == "…]"
    assert max(font.getlength(line) for line in (key, name)) <= SIDE
    assert describe(long[-30:], "", font).replace("\n", "") == long[-30:]
    assert describe("short", "3", font) == "short\n[3]"
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)).save(buffer, "PNG")
    draw_sheet(open_shards(write_tar(tmp_path / "x.tar", {"a.png": buffer.getvalue()})), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        inside = np.asarray(sheet.crop((60, 60, 120, 120)).convert("L"))
    assert inside.min() < 20 and inside.max() > 235  # was 15
