"""The masks that probe=segment finds, in the hands of pycocotools, segment-anything and our own reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.images.masks import decode, read_record
from mae.errors import ConfigError
from mae.sam.scores import Found, Photograph, stability
from tasks.segment_eval import SegmentProbe, evaluate_segmentation
from tests.masked_photos import jpeg, record, shapes, shards_of_shapes, write_tar
from tests.test_segment import trained

coco = pytest.importorskip("pycocotools.coco")
cocoeval = pytest.importorskip("pycocotools.cocoeval")


@pytest.fixture(scope="module")
def segment_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = shards_of_shapes(tmp_path_factory.mktemp("shapes"))
    return trained(tmp_path_factory.mktemp("runs"), shards, "name=found", "max_steps=1", "val_every=null")


def find(run: Path, out: Path, **given: Any) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Returns the folder of masks, and the scores of the same evaluation."""
    probe = SegmentProbe(name="segment", clicks=[1, 2], pictures=0, masks=True, images=given.pop("images", None))
    return out / "segment_masks", evaluate_segmentation(probe, run, {"workers": 0} | given, 7, out)


def coco_ap(truth: Any, results: Any) -> float:
    measured = cocoeval.COCOeval(truth, truth.loadRes(results), "segm")
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    return float(measured.stats[0])


def test_pycocotools_scores_the_masks_that_are_found(segment_run: Path, real_images: Path, tmp_path: Path) -> None:
    data = {"path": str(real_images / "coco_sa1b"), "val_path": None}
    folder, scores = find(segment_run, tmp_path, images=3, **data)
    truth = coco.COCO(folder / "truth.json")
    assert len(truth.imgs) == 3 and 522418 in truth.imgs  # the ids of COCO itself, from the records
    objects = list(truth.anns.values())
    assert len(objects) == scores["trained"]["objects"]
    perfect = [{key: one[key] for key in ("image_id", "category_id", "segmentation")} | {"score": 1} for one in objects]
    assert coco_ap(truth, perfect) == pytest.approx(1)
    measured = {"1_click": scores["trained"]["clicks"][1], "2_clicks": scores["trained"]["clicks"][2]}
    for name, mean in (measured | {"box": scores["trained"]["box"]}).items():
        results = json.loads((folder / f"{name}.json").read_text())
        assert [one["image_id"] for one in results] == [one["image_id"] for one in objects]
        ious = []
        for found, true in zip(results, objects, strict=True):
            one, other = decode(found["segmentation"]), decode(true["segmentation"])
            ious.append((one & other).sum() / (one | other).sum())
        assert np.mean(ious) == pytest.approx(mean, abs=1e-5)
        assert 0 <= coco_ap(truth, str(folder / f"{name}.json")) < 1


def test_records_of_found_masks_are_those_of_sa_1b(segment_run: Path, tmp_path: Path) -> None:
    folder, scores = find(segment_run, tmp_path, images=2)
    results = json.loads((folder / "1_click.json").read_text())
    annotations = []
    for file in sorted((folder / "1_click").glob("*.json")):
        codes, size = read_record(file.read_bytes(), (90, 120))
        assert len(codes) == 2 and size == (90, 120)
        annotations += json.loads(file.read_text())["annotations"]
    assert len(annotations) == scores["trained"]["objects"] == 4
    truth = json.loads((folder / "truth.json").read_text())["annotations"]
    for found, result, true in zip(annotations, results, truth, strict=True):
        assert found["segmentation"] == result["segmentation"] and found["predicted_iou"] == result["score"]
        assert 0 <= found["stability_score"] <= 1 and found["crop_box"] == [0, 0, 120, 90]
        ((x, y),) = found["point_coords"]  # the first click lies inside the object
        assert found["point_labels"] == [1] and decode(true["segmentation"])[round(y), round(x)]
        mask = decode(found["segmentation"])
        assert found["area"] == mask.sum()
        if mask.any():
            rows, columns = np.nonzero(mask)
            assert found["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    (boxed, *_) = json.loads(next((folder / "box").glob("*.json")).read_text())["annotations"]
    assert boxed["point_coords"] == [] and len(boxed["input_box"]) == 4


def test_photographs_that_share_a_name_are_named_by_number(segment_run: Path, tmp_path: Path, capsys) -> None:
    for shard in range(2):
        pixels, masks = shapes(shard)
        write_tar(tmp_path / "data" / f"a-val-{shard:06d}.tar", [(jpeg(pixels), record(masks))])
    folder, _ = find(segment_run, tmp_path, val_path=str(tmp_path / "data"))
    assert (
        "image_id of the records and keys of the photographs cannot name them: the numbers" in capsys.readouterr().out
    )
    assert sorted(file.name for file in (folder / "box").iterdir()) == ["000000.json", "000001.json"]
    truth = json.loads((folder / "truth.json").read_text())
    assert [image["id"] for image in truth["images"]] == [0, 1]
    assert [one["image_id"] for one in truth["annotations"]] == [0, 0, 1, 1]


def test_folder_of_masks_is_replaced_if_it_is_ours_alone(segment_run: Path, tmp_path: Path) -> None:
    folder, _ = find(segment_run, tmp_path, images=2)
    find(segment_run, tmp_path, images=1)
    assert len(list((folder / "box").iterdir())) == 1 and not folder.with_name("segment_masks.tmp").exists()
    (folder / "truth.json").write_text("[]")
    with pytest.raises(ConfigError, match="segment_masks holds something else than masks of probe=segment"):
        find(segment_run, tmp_path, images=1)
    assert len(list((folder / "box").iterdir())) == 1


def test_stability_score_equals_that_of_segment_anything() -> None:
    amg = pytest.importorskip("segment_anything.utils.amg")
    torch.manual_seed(0)
    logits = torch.randn(5, 1, 16, 16) * 2
    photograph = Photograph(torch.empty(0), 64, (64, 64), (64, 64))
    found: Any = Found(torch.empty(0), torch.empty(0), logits, None)  # pyright: ignore[reportArgumentType]
    whole = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    expected = amg.calculate_stability_score(whole, 0.0, 1.0)
    torch.testing.assert_close(stability(found, photograph), expected)
    empty: Any = found._replace(logits=torch.full((1, 1, 16, 16), -5.0))
    assert stability(empty, photograph).tolist() == [0]
