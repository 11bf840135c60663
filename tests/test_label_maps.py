"""Maps of classes and depths are read as numbers, whatever their colours, and packed beside their images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.images.label_maps import read_classes, read_depths
from data.index.index import open_shards
from data.index.naming import Naming, read_naming
from data.pack.__main__ import main as pack
from data.storage.read import read

VALUES = np.array([[0, 1, 2], [3, 200, 255]], np.uint8)


def saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_classes_of_grey_palette_and_array_are_their_numbers() -> None:
    coloured = Image.fromarray(VALUES).convert("P")  # Pascal VOC's maps have a palette
    coloured.putpalette([(7 * part) % 256 for part in range(768)])
    coloured.putdata(VALUES.flatten().tolist())
    for data in (saved(Image.fromarray(VALUES)), saved(coloured), array(VALUES)):
        assert np.array_equal(read_classes(data), VALUES)


def test_classes_of_16_bits_keep_them() -> None:
    values = VALUES.astype(np.uint16) * 200
    for data in (saved(Image.fromarray(values)), array(values), array(values.astype(">u2"))):
        found = read_classes(data)
        assert found.dtype.itemsize == 2 and np.array_equal(found, values)


def test_depths_are_metres_and_0_where_nothing_was_measured() -> None:
    millimetres = np.array([[0, 1500], [65535, 10]], np.uint16)
    assert read_depths(saved(Image.fromarray(millimetres)), 1e-3) == pytest.approx(millimetres / 1000)
    metres = np.array([[np.nan, 1.5], [np.inf, -1.0]], np.float32)
    assert read_depths(array(metres), 1e-3).tolist() == [[0, 1.5], [0, 0]]


def test_pictures_of_colours_and_real_numbers_are_no_classes() -> None:
    with pytest.raises(DataError, match="picture of colours"):
        read_classes(saved(Image.fromarray(VALUES).convert("RGB")))
    with pytest.raises(DataError, match="its map is of float32, and classes are uint8 or uint16"):
        read_classes(array(np.ones((2, 2), np.float32)))
    with pytest.raises(DataError, match=r"of uint8 \[2, 2, 2\], and a map is \[height, width\]"):
        read_classes(array(np.ones((2, 2, 2), np.uint8)))
    noise = np.random.default_rng(0).integers(256, size=(64, 64)).astype(np.uint8)
    with pytest.raises(DataError, match="its map cannot be decoded: the PNG image"):
        read_classes(saved(Image.fromarray(noise))[:2000])
    with pytest.raises(DataError, match="cannot be decoded"):
        read_classes(b"\x93NUMPYxx")


def photographs(folder: Path, *names: str) -> Path:
    """Photographs of 6 x 4 pixels, each of one colour."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number * 20, 0, 0)).save(folder / name)
    return folder


def maps(folder: Path, *names: str, size: tuple[int, int] = (4, 6)) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(saved(Image.fromarray(np.full(size, number, np.uint8))))
    return folder


def packed(out: Path) -> dict[str, dict[str, bytes]]:
    """Returns key -> extension -> contents of the members of all samples."""
    index = open_shards(str(out))
    found = {}
    for sample in range(len(index)):
        members = {member.name: member for member in index.members(sample)}
        contents = {name: read(index.shards[0], member.offset, member.size) for name, member in members.items()}
        found[index.key(sample)] = {name.partition(".")[2]: data for name, data in contents.items()}
    return found


def test_maps_are_packed_beside_their_images_with_names_and_void(tmp_path: Path, capsys) -> None:
    """ADE20K: images/training/x.jpg and annotations/training/x.png."""
    images = photographs(tmp_path / "images", "training/a.jpg", "training/b.jpg", "training/c.png")
    labels = maps(tmp_path / "annotations", "training/a.png", "training/b.png", "training/z.png")
    (tmp_path / "names.txt").write_text("wall\nsky\n")
    names = ["--label-classes", str(tmp_path / "names.txt"), "--void", "0"]
    out = tmp_path / "out"
    pack([str(images / "training"), str(out), "--label-maps", str(labels / "training"), *names])
    said = capsys.readouterr().err
    assert "1 images without a label map (c.png)" in said and "1 label maps without an image (z.png)" in said
    found = packed(out)
    assert {key: sorted(members) for key, members in found.items()} == {
        "a": ["jpg", "seg.png"],
        "b": ["jpg", "seg.png"],
    }
    assert found["b"]["seg.png"] == (labels / "training" / "b.png").read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["label_maps"] == {"extension": "seg.png", "classes": ["wall", "sky"], "void": 0}
    assert manifest["classes"] == [] and read_naming([f"{out}/x.tar"]) == Naming(["wall", "sky"], 0, "seg.png", True)
    assert images_of(out) == ["a.jpg", "b.jpg"]
    pack([str(out), str(tmp_path / "again")])  # tars keep what is known of their maps
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["label_maps"] == manifest["label_maps"]
    assert packed(tmp_path / "again") == found


def images_of(out: Path) -> list[str]:
    index = open_shards(str(out), maps=("seg.png",))
    assert not index.passed_over
    return sorted(f"{index.key(sample)}.jpg" for sample in range(len(index)))


def test_manifests_that_name_the_classes_of_maps_differently_are_refused(tmp_path: Path) -> None:
    for name, said in {"a": {"label_maps": {"classes": ["x", "y"]}}, "b": {"void": 3}, "c": {"classes": ["z"]}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(said))
    a, b, c = (str(tmp_path / name / "0.tar") for name in "abc")
    assert read_naming([a, c]).names == ["x", "y"]  # images of other classes have no maps
    with pytest.raises(DataError, match="name the classes of label maps differently"):
        read_naming([a, b])


def test_names_that_differ_are_matched_as_said(tmp_path: Path) -> None:
    """Cityscapes: leftImg8bit/train/ulm/ulm_0_leftImg8bit.png and gtFine/train/ulm/ulm_0_gtFine_labelTrainIds.png."""
    images = photographs(
        tmp_path / "leftImg8bit", "train/bonn/bonn_0_leftImg8bit.png", "train/ulm/ulm_0_leftImg8bit.png"
    )
    labels = maps(
        tmp_path / "gtFine",
        *(
            f"train/{city}/{city}_0_gtFine_{kind}.png"
            for city in ("bonn", "ulm")
            for kind in ("color", "labelTrainIds")
        ),
    )
    words = ["--label-maps", str(labels / "train"), "--label-name", "leftImg8bit=gtFine_labelTrainIds"]
    pack([str(images / "train"), str(tmp_path / "out"), *words])
    assert [sorted(members) for members in packed(tmp_path / "out").values()] == [["cls", "png", "seg.png"]] * 2


def test_listed_images_find_their_maps_without_their_folder_and_depths_too(tmp_path: Path) -> None:
    """Pascal VOC: a list of JPEGImages/x.jpg, and SegmentationClass/x.png."""
    photographs(tmp_path / "JPEGImages", "a.jpg", "b.jpg")
    labels = maps(tmp_path / "SegmentationClass", "a.png", "b.png")
    depths = tmp_path / "depth"
    depths.mkdir()
    np.save(depths / "a.npy", np.ones((4, 6), np.float32))
    (tmp_path / "train.csv").write_text("path\nJPEGImages/a.jpg\nJPEGImages/b.jpg\n")
    words = ["--label-maps", str(labels), "--depth-maps", str(depths)]
    pack([str(tmp_path / "train.csv"), str(tmp_path / "out"), *words])
    assert [sorted(members) for members in packed(tmp_path / "out").values()] == [["depth.npy", "jpg", "seg.png"]]


def test_map_of_another_size_is_listed_as_bad(tmp_path: Path, capsys) -> None:
    images = photographs(tmp_path / "images", "a.jpg", "b.jpg")
    labels = maps(tmp_path / "maps", "a.png")
    maps(labels, "b.png", size=(2, 3))
    pack([str(images), str(tmp_path / "out"), "--label-maps", str(labels), "--jobs", "1"])
    assert list(packed(tmp_path / "out")) == ["a"]
    assert "has 2x3 pixels and the image 4x6" in (tmp_path / "out" / "bad_files.txt").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--label-maps", "other"],
            "has a map for none of the 2 images; the first image is x/a.jpg, the first map q.png",
        ),
        (["--label-maps", "shared"], "x/a.jpg and y/a.jpg would share the map"),
        (["--label-maps", "nowhere"], "is no folder"),
        (["--label-maps", "other", "--shorter-side", "2"], "fit images as they are, not resized"),
        (["--void", "255"], "--void 255 says what --label-maps are: add those"),
        (["--label-maps", "shared", "--label-name", "x"], "--label-name x is not OLD=NEW"),
    ],
)
def test_maps_that_cannot_be_packed_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "images", "x/a.jpg", "y/a.jpg")
    maps(tmp_path / "other", "q.png")
    maps(tmp_path / "shared", "a.png")
    with pytest.raises(DataError, match=reason):
        pack(["images", "out", *words])


def test_unfinished_pack_with_other_maps_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = photographs(tmp_path / "images", "a.jpg"), maps(tmp_path / "maps", "a.png")
    words = [str(images), str(tmp_path / "out"), "--label-maps", str(labels)]
    pack([*words, "--part", "1/1"])
    with pytest.raises(DataError, match=r"label or depth maps \(--label-maps, .*\) that are others than now"):
        pack([*words, "--void", "0"])
    pack([*words, "--merge"])
    assert list(packed(tmp_path / "out")) == ["a"]
