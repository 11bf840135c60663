"""Photographs with instance masks reach the frame with every pixel in its place."""

import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.datamodule import DataConfig
from data.errors import DataError
from data.images.masks import CodedMasks, decode, encode, nearest, read_record
from data.index.index import open_shards
from data.index.passed_over import PassedOver
from data.inspect.__main__ import main as inspect
from data.loader.faults import Faults
from data.loader.mask_dataset import Frame, MaskDataset
from data.loader.photograph_dataset import fit
from data.mask_datamodule import MaskDataModule
from data.order.samplers import MicroBatch
from data.pack.__main__ import main as pack
from data.pack.coco import with_masks
from data.pack.image_folder import find_images
from data.pack.sample import Source
from data.pack.sources import open_source
from mae.sam.square_frame import boxes_to_frame, maps_to_photograph, points_to_frame
from tests.masked_photos import jpeg, record, shapes, shards_of_shapes, write_coco, write_tar

coco = pytest.importorskip("pycocotools.mask")
transforms = pytest.importorskip("segment_anything.utils.transforms")

SIDES = st.integers(1, 5000)


def first(tar: Path, frame: Frame, seed: int | None = None, epoch: int = 0):
    return MaskDataset(open_shards(str(tar)), frame, seed)[MicroBatch(epoch, np.array([0]), np.array([0]))]


# Geometry.


@given(SIDES, SIDES, st.sampled_from([64, 256, 1024]))
def test_frame_size_equals_that_of_segment_anything(height: int, width: int, side: int) -> None:
    assert fit(height, width, side) == transforms.ResizeLongestSide.get_preprocess_shape(height, width, side)


@given(st.tuples(st.integers(8, 5000), st.integers(8, 5000)), st.data())
@settings(max_examples=200)
def test_click_on_a_mask_cell_names_the_pixel_that_the_cell_shows(size: tuple[int, int], data: st.DataObject):
    """Cells of the mask frame, pixels of the image frame and pixels of the photograph name the same place."""
    side, stride = 256, 4
    inside = fit(*size, side)
    for axis in (0, 1):
        pixels = nearest(size[axis], inside[axis], stride)
        assert len(pixels) <= side // stride and (len(pixels) == 0 or 0 <= pixels.min() <= pixels.max() < size[axis])
        if len(pixels) == 0:
            continue
        cell = data.draw(st.integers(0, len(pixels) - 1))
        click = (cell + 0.5) * stride - 0.5
        point = points_to_frame(torch.tensor([float(pixels[cell])] * 2, dtype=torch.float64), size, inside)[1 - axis]
        # Half a pixel of the photograph, in pixels of the frame.
        assert abs(float(point) - click) <= 0.5 * inside[axis] / size[axis] + 1e-9
        mirrored = nearest(size[axis], inside[axis], stride, mirrored=True)
        assert (mirrored == size[axis] - 1 - pixels).all()


@given(st.tuples(st.integers(8, 5000), st.integers(8, 5000)), st.floats(0, 1), st.floats(0, 1))
def test_points_in_the_frame_lie_within_half_a_pixel_of_segment_anything(
    size: tuple[int, int], x: float, y: float
) -> None:
    """Theirs scales the number of a pixel, ours its centre."""
    point = np.array([[int(x * (size[1] - 1)), int(y * (size[0] - 1))]])
    theirs = transforms.ResizeLongestSide(1024).apply_coords(point, size)
    ours = points_to_frame(torch.from_numpy(point).double(), size, fit(*size, 1024)).numpy()
    assert np.abs(ours - theirs).max() <= 0.5 * max(1, 1024 / max(size)) + 1e-6
    box = torch.tensor([0.0, 0.0, size[1], size[0]], dtype=torch.float64)
    height, width = fit(*size, 1024)
    assert boxes_to_frame(box, size, (height, width)).tolist() == pytest.approx([0, 0, width, height])


@pytest.mark.parametrize(
    ("size", "orientation"),
    [((200, 300), turn) for turn in range(1, 9)] + [((300, 200), 6), ((3024, 4032), 1), ((3024, 4032), 6)],
    ids=str,
)
def test_image_mask_and_points_of_a_square_agree_in_the_frame(tmp_path: Path, size, orientation: int) -> None:
    height, width = size
    top, left, edge = height // 5, width * 3 // 5, height // 5
    mask = np.zeros(size, bool)
    mask[top : top + edge, left : left + edge] = True
    pixels = np.where(mask[..., None], np.uint8(250), np.uint8(10)).repeat(3, 2)
    tar = write_tar(tmp_path / "a.tar", [(jpeg(pixels, orientation), record([mask]))])
    batch = first(tar, Frame(256))
    assert tuple(batch["originals"][0]) == size
    inside = tuple(batch["inside"][0])
    assert max(inside) == 256 and (batch["images"][0, :, inside[0] :] == 0).all()
    # The middle of each cell of the mask frame is bright where the mask is, and dark elsewhere, but for the edges.
    bright = batch["images"][0, 0].float() > 128
    cells = torch.nn.functional.avg_pool2d(bright.float()[None], 4)[0]
    whole = (cells == 0) | (cells == 1)
    assert torch.equal(cells.bool()[whole], torch.from_numpy(batch["masks"][0])[whole]) and whole.float().mean() > 0.9
    centre = torch.tensor([left + edge // 2, top + edge // 2]).float()
    x, y = points_to_frame(centre, size, inside).round().int().tolist()
    assert bright[y, x] and batch["masks"][0, y // 4, x // 4]
    # And back: logits of that mask at the size of the photograph.
    logits = torch.where(torch.from_numpy(batch["masks"][:, None]), 10.0, -10.0)
    back = maps_to_photograph(logits, 256, inside, size)[0, 0] > 0
    assert (back.numpy() & mask).sum() / (back.numpy() | mask).sum() > 0.85


def test_eight_exif_orientations_of_a_photograph_give_the_same_image_and_masks(
    tmp_path: Path, real_images: Path
) -> None:
    files = sorted((real_images / "large_photos" / "exif_orientation").glob("*.jpg"))
    with Image.open(files[0]) as upright:
        mask = np.zeros((upright.height, upright.width), bool)
    mask[: mask.shape[0] // 3, : mask.shape[1] // 4] = True
    tar = write_tar(tmp_path / "turns.tar", [(file.read_bytes(), record([mask])) for file in files])
    batch = MaskDataset(open_shards(str(tar)), Frame(256))[MicroBatch(0, np.arange(8), np.arange(8))]
    assert not batch["bad"] and len(files) == 8
    assert (batch["masks"] == batch["masks"][0]).all()
    images = batch["images"].float()
    assert (images - images[0]).abs().mean() < 3  # they were compressed one by one


def test_mirrored_photograph_has_mirrored_masks(tmp_path: Path) -> None:
    pixels, masks = shapes(3, 96, 128)
    tar = write_tar(tmp_path / "a.tar", [(jpeg(pixels), record(masks))])
    frame = Frame(128, stride=4)
    plain, seen = first(tar, frame), set()
    for epoch in range(8):
        drawn = first(tar, frame, seed=0, epoch=epoch)
        order = np.argsort(drawn["numbers"])
        flipped = not np.array_equal(drawn["images"], plain["images"])
        seen.add(flipped)
        expected = plain["images"].flip(-1) if flipped else plain["images"]
        assert torch.equal(drawn["images"], expected)
        again = plain["masks"][:, :, ::-1] if flipped else plain["masks"]
        assert (drawn["masks"][order] != again).mean() < 0.01  # a cell may fall between two pixels
    assert seen == {True, False}


# Masks.


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_run_lengths_round_trip_through_pycocotools(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    code = json.loads(json.dumps(encode(mask)))
    assert np.array_equal(decode(code), mask)
    assert np.array_equal(coco.decode(code).astype(bool), mask)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()  # uncompressed, as of COCO's crowds
    assert np.array_equal(decode({"size": [height, width], "counts": counts}), mask)


def test_chosen_masks_are_determined_by_seed_epoch_and_position(tmp_path: Path) -> None:
    masks = [np.zeros((64, 64), bool) for _ in range(20)]
    for number, mask in enumerate(masks):
        mask[number * 3 : number * 3 + 4] = True
    tar = write_tar(tmp_path / "a.tar", [(jpeg(np.zeros((64, 64, 3), np.uint8)), record(masks))])
    frame = Frame(64, masks_per_image=5, stride=1)
    numbers = [first(tar, frame, 0, epoch)["numbers"].tolist() for epoch in (0, 0, 1, 2)]
    assert numbers[0] == numbers[1] and len({tuple(sorted(chosen)) for chosen in numbers}) == 3
    assert first(tar, frame)["numbers"].tolist() == [0, 5, 10, 14, 19]  # spread, where nothing is drawn
    batch = first(tar, frame, 0)
    for mask, number in zip(batch["masks"], batch["numbers"], strict=True):
        assert np.array_equal(mask, masks[number])
    # Small ones are for images that have no others; those that are scored are all there.
    large = first(tar, frame._replace(min_area=4 / 64, masks_per_image=20), 0)["numbers"]
    assert sorted(large.tolist()) == list(range(20)) and masks[19][57:61].all()
    masks[3][:] = False
    masks[3][9, :5] = True
    mixed = write_tar(tmp_path / "b.tar", [(jpeg(np.zeros((64, 64, 3), np.uint8)), record(masks))])
    assert 3 not in first(mixed, frame._replace(min_area=4 / 64, masks_per_image=20), 0)["numbers"]
    assert 3 in first(mixed, frame._replace(min_area=4 / 64, masks_per_image=20))["numbers"]
    assert len(first(mixed, frame._replace(min_area=0.5), 0)["numbers"]) == 5


def test_masks_of_public_photographs_equal_those_of_pycocotools(real_images: Path) -> None:
    config = DataConfig(path=str(real_images / "coco_sa1b"), workers=0)
    data = MaskDataModule(config, image_size=256, masks_per_image=None, seed=0, global_batch=1, micro_batch=1)
    assert data.val_index is not None and (len(data.train_index), len(data.val_index)) == (137, 69)
    dataset, total = data.dataset(data.val_index), 0
    for sample in range(69):
        total += len(dataset[MicroBatch(0, np.array([sample]), np.array([sample]))]["masks"])
    assert total == 566
    batch = dataset[MicroBatch(0, np.array([3]), np.array([3]))]
    member = next(m for m in data.val_index.members(3) if m.name.endswith(".json"))
    with open(data.val_index.shards[0], "rb") as file:
        file.seek(member.offset)
        annotations = json.loads(file.read(member.size))["annotations"]
    for mask, annotation in zip(batch["masks"], annotations, strict=True):
        assert np.array_equal(mask, coco.decode(annotation["segmentation"])) and mask.sum() == annotation["area"]


def test_coded_masks_are_counted_without_being_decoded_and_stacked_a_few_at_a_time(tmp_path: Path) -> None:
    whole = [np.zeros((30, 40), bool) for _ in range(5)]
    for number, mask in enumerate(whole):
        mask[: 6 * number, 3:9] = True
    coded = CodedMasks([encode(mask) for mask in whole], (30, 40))
    assert coded.areas.tolist() == [mask.sum() for mask in whole]
    assert np.array_equal(coded.stack(1, 4), np.stack(whole[1:4])) and len(coded.stack(4, 9)) == 1
    tar = write_tar(tmp_path / "a.tar", [(jpeg(np.zeros((30, 40, 3), np.uint8)), record(whole * 40))])
    batch = first(tar, Frame(64, None))
    assert len(batch["masks"]) == 160 and batch["numbers"][:5].tolist() == [1, 2, 3, 4, 6]  # the empty one is left out
    assert len(pickle.dumps(batch["masks"])) < 160 * 30 * 40 / 4


def test_photograph_packed_smaller_keeps_the_masks_of_its_original(tmp_path: Path) -> None:
    pixels, masks = shapes(5, 300, 401)
    folder = tmp_path / "large"
    write_tar(folder / "a-train-000000.tar", [(jpeg(pixels), record(masks))])
    pack([str(folder), str(tmp_path / "small" / "train"), "--shorter-side", "160", "--jobs", "1"])
    (tar,) = (tmp_path / "small" / "train").glob("*.tar")
    large, small = first(folder / "a-train-000000.tar", Frame(128)), first(tar, Frame(128))
    assert not small["bad"] and np.array_equal(small["originals"], [[300, 401]])
    assert (large["masks"] != small["masks"]).mean() < 0.01
    assert (large["images"].float() - small["images"].float()).abs().mean() < 4


# What is wrong with a file.


def reason_of_bad_sample(tar: Path) -> str:
    batch = MaskDataset(open_shards(str(tar)), Frame(64))[MicroBatch(0, np.array([0]), np.array([0]))]
    return batch["bad"][0]["reason"]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (None, "no .json with masks"),
        (b"{", "no SA-1B record"),
        (b'{"annotations": [{"segmentation": [[1, 2, 3, 4, 5, 6]]}]}', "no SA-1B record"),
        (b'{"annotations": []}', "nothing to segment"),
        (b"[" * 100_000, "no SA-1B record"),
        (b'{"annotations": [{"segmentation": {"size": [1e999, 120], "counts": [9, 9]}}]}', "no SA-1B record"),
        (record([np.ones((120, 90), bool)]), "its masks are 120x90, the upright image is 90x120"),
        (record([np.zeros((90, 120), bool)]), "none of its 1 masks covers a cell"),
        (b'{"annotations": [{"segmentation": {"size": [90, 120], "counts": [1, "x"]}}]}', "cannot be decoded"),
        (b'{"annotations": [{"segmentation": {"size": [90, 120], "counts": [9, 9]}}]}', "are of 18 pixels"),
        (b'{"annotations": [{"segmentation": {"size": ["x", 120], "counts": [9, 9]}}]}', "no SA-1B record"),
    ],
)
def test_sample_without_usable_masks_is_reported_as_bad(tmp_path: Path, contents, expected: str) -> None:
    pixels, masks = shapes(0)
    tar = write_tar(tmp_path / "a.tar", [(jpeg(pixels), contents), (jpeg(pixels), record(masks))])
    assert expected in reason_of_bad_sample(tar)


def test_shards_without_mask_records_raise_data_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-train-000000.tar", [(jpeg(shapes(0)[0]), None)] * 4)
    config = DataConfig(path=str(tmp_path), workers=0)
    with pytest.raises(DataError, match=r"has no .json with masks .* --masks instances.json"):
        MaskDataModule(config, image_size=64, masks_per_image=4, seed=0, global_batch=2, micro_batch=2)
    shards_of_shapes(tmp_path / "shapes")
    config = DataConfig(path=str(tmp_path / "shapes"), workers=0, views_per_image=2)
    with pytest.raises(DataError, match="one view per image"):
        MaskDataModule(config, image_size=64, masks_per_image=4, seed=0, global_batch=2, micro_batch=2)


# Packing.


@pytest.fixture
def coco_folder(tmp_path: Path) -> tuple[Path, Path]:
    return write_coco(tmp_path / "images", tmp_path / "instances.json")


def test_coco_annotations_are_packed_as_records_and_read_back(tmp_path: Path, coco_folder, capsys) -> None:
    images, file = coco_folder
    pack([str(images), str(tmp_path / "out" / "train"), "--masks", str(file), "--jobs", "1"])
    printed = capsys.readouterr()
    assert "3 samples" in printed.out and "1 images without an object in the annotations (3.jpg)" in printed.err
    index = open_shards(str(tmp_path / "out" / "train"))
    dataset = MaskDataset(index, Frame(128, None))
    for sample in range(3):
        batch = dataset[MicroBatch(0, np.array([sample]), np.array([sample]))]
        number = int(batch["keys"][0])
        expected = shapes(number)[1]
        assert len(batch["masks"]) == len(expected) + (number == 0)
        assert all(np.array_equal(mask, own) for mask, own in zip(batch["masks"], expected, strict=False))
        if number == 0:
            assert abs(batch["masks"][2].sum() - 1600) < 100 and batch["masks"][2][40, 30]
        member = next(m for m in index.members(sample) if m.name.endswith(".json"))
        with open(index.shards[0], "rb") as tar:
            tar.seek(member.offset)
            contents = tar.read(member.size)
        assert len(read_record(contents, (90, 120))[0]) == len(batch["masks"])
        first_of = json.loads(contents)["annotations"][0]
        assert first_of["bbox"] == coco.toBbox(first_of["segmentation"]).tolist()
        assert first_of["area"] == coco.area(first_of["segmentation"])
        x, y = map(int, first_of["point_coords"][0])
        assert batch["masks"][0][y, x]


def test_bad_coco_annotations_raise_data_error(tmp_path: Path, coco_folder) -> None:
    images, file = coco_folder
    source = find_images(images)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="cannot be read as COCO instances"):
        with_masks(source, tmp_path / "other.json")
    contents = json.loads(file.read_text())
    for image in contents["images"]:
        image["file_name"] = f"elsewhere/{image['id']}.png"
    (tmp_path / "renamed.json").write_text(json.dumps(contents))
    with pytest.raises(DataError, match=r"names none of the 4 images .* elsewhere/10.png"):
        with_masks(source, tmp_path / "renamed.json")
    with pytest.raises(DataError, match="leave out --shorter-side"):
        pack([str(images), str(tmp_path / "out"), "--masks", str(file), "--shorter-side", "64"])
    contents = json.loads(file.read_text())
    contents["images"][0] |= {"height": 120, "width": 90}
    (tmp_path / "turned.json").write_text(json.dumps(contents))
    turned = with_masks(source, tmp_path / "turned.json").samples[0]
    with pytest.raises(DataError, match="it is 90x120 upright, and 120x90 in the annotations"):
        dict(turned.others)["json"]()


# Annotations as tools write them.


def annotated(tmp_path: Path, names: list[str], images: list[dict], annotations: list[dict]) -> tuple[Source, Path]:
    """Images of 64 x 96 pixels, called `names` below a folder, and a COCO file."""
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(jpeg(np.zeros((64, 96, 3), np.uint8)))
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return find_images(tmp_path / "in"), file


def entry(number: Any, name: str, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": 64, "width": 96} | fields


def square(image: Any, left: int = 20, **fields: Any) -> dict[str, Any]:
    corners = [[left, 15, left + 20, 15, left + 20, 35, left, 35]]
    return {"id": 0, "image_id": image, "segmentation": corners} | fields


def masked(source: Source, file: Path) -> tuple[Source, str]:
    """Returns the images with records, and what was passed over."""
    passed_over = PassedOver()
    return with_masks(source, file, passed_over), str(passed_over)


def lefts(source: Source) -> dict[str, list[int]]:
    """origin -> left edge of each mask."""
    records = {sample.origin: json.loads(dict(sample.others)["json"]()) for sample in source.samples}
    return {origin: [int(a["bbox"][0]) for a in record["annotations"]] for origin, record in records.items()}


FOLDERS = ["cam1/000.jpg", "cam2/000.jpg"]


@pytest.mark.parametrize(
    ("names", "images", "said"),
    [
        (FOLDERS, [entry(0, "000.jpg")], "000.jpg fits several images of the source, cam1/000.jpg and cam2/000.jpg"),
        (["000.jpg"], [entry(0, "000.jpg"), entry(1, "000.jpg")], "two entries for the image 000.jpg: 000.jpg (id 0)"),
        (["000.jpg"], [entry(0, "a/000.jpg"), entry(1, "b/000.jpg")], "a/000.jpg (id 0) and b/000.jpg (id 1)"),
        (["0.jpg", "1.jpg"], [entry(0, "0.jpg"), entry(0, "1.jpg")], "two images of the id 0, 0.jpg and 1.jpg"),
        (["a/0.jpg", "b/0.png"], [entry(0, "0.webp")], "0.webp fits several images"),
    ],
)
def test_ambiguous_file_name_raises_data_error_with_both_paths(tmp_path: Path, names, images, said: str) -> None:
    source, file = annotated(tmp_path, names, images, [square(0), square(1)])
    with pytest.raises(DataError, match=re.escape(said)):
        with_masks(source, file)


@pytest.mark.parametrize(
    "name",
    ["images\\000.jpg", "../../label-studio/upload/1/000.jpg", "C:\\data\\000.jpg", "000.png", "000.JPG", "./000.jpg"],
)
def test_file_name_of_another_machine_is_matched_where_that_is_certain(tmp_path: Path, name: str) -> None:
    source, file = annotated(tmp_path, ["000.jpg", "001.jpg"], [entry(0, name), entry(1, "gone.jpg")], [square(0)])
    found, said = masked(source, file)
    assert lefts(found) == {"000.jpg": [20]}
    assert "1 images that the annotations do not name (001.jpg)" in said
    assert ("another extension" in found.note) == (name in ("000.png", "000.JPG"))


def test_file_names_with_folders_keep_frames_of_several_cameras_apart(tmp_path: Path) -> None:
    names = ["cam1/000.jpg", "cam2/000.jpg", "cam3/000.jpg"]
    images = [entry(1, "frames\\cam2\\000.jpg"), entry(0, "cam1/000.jpg"), entry(2, "cam4/000.jpg")]
    source, file = annotated(tmp_path, names, images, [square(0, 5), square(1, 50), square(2, 70)])
    found, said = masked(source, file)
    assert lefts(found) == {"cam1/000.jpg": [5], "cam2/000.jpg": [50]}
    assert "1 annotated images that are not in the source (cam4/000.jpg)" in said


@pytest.mark.parametrize(("identity", "reference"), [(0, "0"), ("0", 0), (0.0, 0), ("a", "a ")])
def test_ids_are_compared_as_text(tmp_path: Path, identity, reference) -> None:
    source, file = annotated(tmp_path, ["0.jpg"], [entry(identity, "0.jpg")], [square(reference)])
    assert lefts(with_masks(source, file)) == {"0.jpg": [20]}


UNUSABLE = {
    "without a shape": [None, [], {}, "polygon", 7],
    "without a polygon of three points": [
        [[20, 15, 40, 35]],
        [20, 15, 40, 35],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[None] * 6],
        [[10**400] * 6],
    ],
    "far outside of their image": [
        [[-164.1, -221.8, 208543216, 352186880, 225.9, 236.5, 272.0, 384.2]],
        [[10, 10, float("nan"), 20, 30, 30, 10, 30]],
        [[10, 10, float("inf"), 20, 30, 30]],
        [[None] * 6],
        [[0, 0, 9e6, 0, 0, 9e6]],
    ],
    "that do not fill their image": [
        {"size": [64, 96], "counts": [1295, 20, 44, 20, 44]},
        {"size": [64, 96], "counts": [7000]},
        {"size": [64, 96], "counts": [10**30]},
        {"size": [64, 96], "counts": [100, -50, 6094]},
        {"size": [64, 96], "counts": "!"},
        {"size": [64, 96], "counts": encode(np.ones((64, 40), bool))["counts"]},
        {"size": [64, 96]},
        {"size": [64, 96], "counts": None},
    ],
    "of another size than their image": [encode(np.ones((96, 64), bool)), {"counts": [1]}, {"size": 3, "counts": "1"}],
    "without a pixel on their image": [
        [[500, 500, 520, 500, 520, 520]],
        [[20, 15, 20.3, 15, 20.3, 15.3]],
        encode(np.zeros((64, 96), bool)),
        {"size": [64, 96], "counts": []},
    ],
}


@pytest.mark.parametrize(("reason", "shapes"), UNUSABLE.items())
def test_objects_without_a_usable_shape_are_left_out_and_counted(tmp_path: Path, reason: str, shapes) -> None:
    bad = [{"image_id": 0, "segmentation": shape} for shape in shapes] + [square(1)]
    images = [entry(0, "0.jpg"), entry(1, "1.jpg")]
    source, file = annotated(tmp_path, ["0.jpg", "1.jpg"], images, [*bad, square(0)])
    found, said = masked(source, file)
    assert lefts(found) == {"0.jpg": [20], "1.jpg": [20]}
    assert sum(map(int, re.findall(r"(\d+) objects with", said))) == len(shapes) and reason in said
    # Alone on its image: the image is left out, and where there is no other, the file is refused.
    source, file = annotated(tmp_path, [], images, bad)
    found, said = masked(source, file)
    assert lefts(found) == {"1.jpg": [20]} and "1 images without an object in the annotations (0.jpg)" in said
    source, file = annotated(tmp_path, [], images, bad[:-1])
    with pytest.raises(DataError, match=f"no usable object on the images .*{reason}"):
        with_masks(source, file)


def test_annotation_without_a_key_takes_part_as_far_as_it_can(tmp_path: Path) -> None:
    whole = square(0)
    flat = {"image_id": 0, "segmentation": whole["segmentation"][0]}
    points = {"image_id": 0, "segmentation": [[20, 15], [40, 15], [40, 35], [20, 35]]}
    pieces = square(0, segmentation=[[1, 2, 3, 4], *whole["segmentation"]])
    texts = square(0, segmentation=[[str(x) for x in whole["segmentation"][0]]], iscrowd="0")
    images = [{"id": 0, "file_name": "0.jpg"}]  # no size
    source, file = annotated(tmp_path, ["0.jpg"], images, [flat, points, pieces, texts, {"image_id": 0}])
    found, said = masked(source, file)
    assert lefts(found) == {"0.jpg": [20] * 4}
    assert "1 objects without a shape" in said and "1 polygons of fewer than three points" in said


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ([], "has no annotations"),
        (
            [square(0, iscrowd=1)] * 3,
            "its annotations are 3 crowds (annotation 0, annotation 0, annotation 0), and the first image has the id 0",
        ),
        (
            [square(7), square("8")],
            "2 objects of images that have no entry (image_id 7, image_id '8'), and the first image has the id 0",
        ),
    ],
)
def test_coco_file_without_objects_says_why(tmp_path: Path, annotations, said: str) -> None:
    source, file = annotated(tmp_path, ["0.jpg"], [entry(0, "0.jpg")], annotations)
    with pytest.raises(DataError, match=re.escape(said)):
        with_masks(source, file)


def test_orphans_and_crowds_are_counted_beside_objects(tmp_path: Path) -> None:
    annotations = [square(0), square(7), square(8), square(0, iscrowd=1)]
    source, file = annotated(tmp_path, ["0.jpg"], [entry(0, "0.jpg")], annotations)
    assert (
        masked(source, file)[1]
        == "2 objects of images that have no entry (image_id 7, image_id 8); 1 crowds (annotation 0)"
    )


def test_json_beside_an_image_that_gets_masks_raises_data_error(tmp_path: Path) -> None:
    _, file = annotated(tmp_path, ["0.jpg"], [entry(0, "0.jpg")], [square(0)])
    (tmp_path / "in" / "0.json").write_text("{}")
    with pytest.raises(DataError, match=r"0\.jpg has a \.json beside it"):
        with_masks(find_images(tmp_path / "in"), file)


def test_sizes_of_stored_pixels_are_named_as_the_cause(tmp_path: Path) -> None:
    source, file = annotated(tmp_path, ["0.jpg"], [entry(0, "0.jpg")], [square(0)])
    (tmp_path / "in" / "0.jpg").write_bytes(jpeg(np.zeros((96, 64, 3), np.uint8), 6))
    record = dict(with_masks(source, file).samples[0].others)["json"]
    with pytest.raises(DataError, match=r"it is 96x64 upright .* of the stored pixels, before its EXIF orientation 6"):
        record()
    source, file = annotated(tmp_path, ["0.jpg"], [{"id": 0, "file_name": "0.jpg", "width": 95}], [square(0)])
    record = dict(with_masks(source, file).samples[0].others)["json"]
    with pytest.raises(DataError, match=r"it is 64x96 upright, and \?x95 in the annotations"):
        record()


def test_what_masks_leave_out_is_kept_in_the_manifest_and_refused_if_strict(
    tmp_path: Path, coco_folder, capsys
) -> None:
    images, file = coco_folder
    words = [str(images), str(tmp_path / "out"), "--masks", str(file), "--jobs", "1"]
    with pytest.raises(
        DataError, match=r"--strict: passed over: 1 crowds \(annotation 91\); 1 images without an object"
    ):
        pack([*words, "--strict"])
    pack(words)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["passed_over"]["crowds"] == {"count": 1, "examples": ["annotation 91"]}
    capsys.readouterr()
    inspect([str(tmp_path / "out"), "--jobs", "1"])
    assert re.search(r"not packed +1 crowds \(annotation 91\)", capsys.readouterr().out)


def test_annotations_that_changed_are_not_mixed_into_a_resumed_pack(tmp_path: Path, coco_folder, capsys) -> None:
    images, file = coco_folder
    words = [str(images), str(tmp_path / "out"), "--masks", str(file), "--jobs", "1", "--shard-size", "1"]
    pack([*words, "--part", "1/2"])
    file.write_text(file.read_text().replace("[[10, 20, 50", "[[12, 20, 50"))
    for more in ([], ["--part", "2/2"], ["--merge"]):
        with pytest.raises(DataError, match=r"annotations \(--masks\) that are others than now"):
            pack([*words, *more])
    pack([*words, "--overwrite"])
    assert "3 samples" in capsys.readouterr().out


def test_annotations_of_images_in_tars_are_matched_by_the_names_of_the_members(tmp_path: Path) -> None:
    pixels, _ = shapes(0, 64, 96)
    tar = write_tar(tmp_path / "x.tar", [(jpeg(pixels), None)] * 2)
    _, file = annotated(tmp_path, ["unused.jpg"], [entry(7, "000001.jpg"), entry(8, "x.jpg")], [square(7), square(8)])
    found, said = masked(open_source(str(tar)), file)
    assert (
        lefts(found) == {f"{tar}/000001.jpg": [20]} and "1 annotated images that are not in the source (x.jpg)" in said
    )


def test_files_of_lvis_and_sizes_of_zero_are_taken(tmp_path: Path) -> None:
    images = [{"id": 2**70, "coco_url": "http://images.cocodataset.org/val2017/0.jpg", "height": 0, "width": 0}]
    source, file = annotated(tmp_path, ["0.jpg"], images, [square(2**70)])
    assert lefts(with_masks(source, file)) == {"0.jpg": [20]}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": 3}', "", "\x1f"])
def test_file_that_is_no_coco_file_raises_data_error(tmp_path: Path, text: str) -> None:
    source, file = annotated(tmp_path, ["0.jpg"], [], [])
    file.write_text(text)
    with pytest.raises(DataError, match="cannot be read as COCO instances"):
        with_masks(source, file)


SHAPES = st.sampled_from([square(0)["segmentation"], *(shape for shapes in UNUSABLE.values() for shape in shapes)])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([0, 1, "2", 3, None]), SHAPES, st.sampled_from([0, 1, None])), max_size=12))
def test_objects_and_images_are_packed_or_counted(tmp_path: Path, drawn) -> None:
    annotations = [{"image_id": image, "segmentation": shape, "iscrowd": crowd} for image, shape, crowd in drawn]
    images = [entry(0, "0.jpg"), entry(1, "1.jpg"), entry(2, "gone.jpg")]
    source, file = annotated(tmp_path, ["0.jpg", "1.jpg", "4.jpg"], images, annotations)
    passed_over = PassedOver()
    try:
        records = lefts(with_masks(source, file, passed_over))
    except DataError as error:
        assert str(file) in str(error)
        return
    counts = passed_over.counts
    objects = sum(number for reason, number in counts.items() if reason == "crowds" or reason.startswith("objects "))
    absent = sum(image == "2" and not crowd for image, _, crowd in drawn)
    assert sum(map(len, records.values())) + objects + absent == len(drawn)
    assert len(records) + sum(number for reason, number in counts.items() if reason.startswith("images ")) == 3
    assert counts.get("annotated images that are not in the source", 0) == bool(absent)


# Photographs without an object.


def test_photographs_without_an_object_are_replaced_and_end_no_run(tmp_path: Path, capsys) -> None:
    """Most photographs have none that covers a cell of the frame; one is damaged."""
    tiny = np.zeros((90, 120), bool)
    tiny[0, 0] = True
    parts = [record([tiny]), record([np.zeros((90, 120), bool)]), b'{"annotations": []}']
    pixels, masks = shapes(0)
    samples = [(jpeg(pixels), parts[number % 3]) for number in range(30)] + [(jpeg(pixels), record(masks))]
    dataset = MaskDataset(open_shards(str(write_tar(tmp_path / "a.tar", samples))), Frame(64, stride=16), seed=0)
    faults = Faults(tmp_path / "bad.jsonl", fraction=0.0)
    capsys.readouterr()
    for epoch in range(2):
        batch = dataset[MicroBatch(epoch, np.arange(31), np.arange(31))]
        assert set(batch["samples"].tolist()) == {30} and len(batch["masks"]) == 62
        faults.note(1000, batch["bad"])
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and faults.bad == 0  # each once
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no object to train on" in said and "no damage" not in said
    broken = lines[0] | {"damaged": True, "reason": "cut short"}
    with pytest.raises(DataError, match="1 of 2001 samples cannot be read"):
        faults.note(1, [broken])
    # Where all masks are scored, nothing stands in for such a photograph.
    whole = MaskDataset(dataset.index, Frame(64, None))
    counts = [len(whole[MicroBatch(0, np.array([n]), np.array([n]))]["masks"]) for n in (0, 1, 2, 30)]
    assert counts == [1, 0, 0, 2]


def test_record_is_the_json_named_after_the_image_alone(tmp_path: Path) -> None:
    pixels, masks = shapes(0)
    path = write_tar(tmp_path / "a.tar", [(jpeg(pixels), None)])
    with tarfile.open(path, "a") as tar:
        for name, data in (("000000.meta.json", b"{}"), ("000000.json", record(masks))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert not first(path, Frame(64))["bad"]
