"""What is trained here answers in segment-anything's SamPredictor and transformers' SamModel with the same masks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea

from data.images.masks import decode
from data.index.index import open_shards
from data.loader.mask_dataset import Frame, MaskDataset
from data.order.samplers import MicroBatch
from mae.demo.sam_model import Marks, open_sam
from mae.export.write import export
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import open_weights
from mae.formats.segment_anything import peer_sam
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.models.pixels import Pixels
from mae.sam.config import SegmentConfig, build_segmenter
from mae.sam.scores import Photograph, at_photograph, photograph_of
from mae.sam.segmenter import BACKGROUND, FOREGROUND, NONE, Prompts, Segmenter
from tests.conftest import ROOT
from tests.documentation import python_blocks
from tests.masked_photos import record, write_tar
from tests.test_sam import randomised

segment_anything = pytest.importorskip("segment_anything")
transformers = pytest.importorskip("transformers")
PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # SAM's 123.675 … and 58.395 …


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes what a run of a narrow SAM at 1024 would have saved, with random weights everywhere."""
    task = SegmentConfig(name="segment", global_blocks=(1,))
    config = MAEConfig(width=48, depth=2, num_heads=3)
    torch.manual_seed(0)
    model = randomised(build_segmenter(config, task, BlocksConfig()))
    recipe = {
        "task": task.model_dump(mode="json"),
        "model": config.model_dump(mode="json"),
        "data": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    path = tmp_path_factory.mktemp("run") / "step-00000001.ckpt"
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"mae": {"step": 1, "recipe": recipe}, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Photograph:
    """A cat of 300 x 451 pixels as a run sees it."""
    file = tmp_path_factory.mktemp("cat") / "cat.png"
    Image.fromarray(chelsea()).save(file)
    mask = np.ones(chelsea().shape[:2], bool)
    tar = write_tar(file.with_name("cat.tar"), [(file.read_bytes(), record([mask]))])
    batch = MaskDataset(open_shards(str(tar)), Frame(1024))[MicroBatch(0, np.array([0]), np.array([0]))]
    tensors = {key: torch.as_tensor(batch[key]) for key in ("images", "inside", "originals")}
    theirs = segment_anything.utils.transforms.ResizeLongestSide(1024).apply_image(chelsea())
    ours = batch["images"][0, :, : theirs.shape[0], : theirs.shape[1]].permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # the same photograph, resized
    return photograph_of(tensors, PIXELS.normalise, torch.device("cpu"))


@pytest.fixture(scope="module")
def sam_file(checkpoint: Path) -> Path:
    """Exports that checkpoint for segment-anything."""
    export(checkpoint, "segment-anything", checkpoint.with_name("sam.pth"))
    return checkpoint.with_name("sam.pth")


POINT, BOX = np.array([[230, 140]]), np.array([60, 30, 400, 280])  # pixels of the photograph


def ours(model: Segmenter, photograph: Photograph, boxed: bool, at: np.ndarray = POINT) -> np.ndarray:
    """Returns the three masks of a point or of the box, for the coordinates as segment-anything scales them."""
    transform = segment_anything.utils.transforms.ResizeLongestSide(1024)
    point = torch.from_numpy(transform.apply_coords(at, photograph.original)).float()[None]
    box = torch.from_numpy(transform.apply_boxes(BOX[None], photograph.original)).float()
    label = torch.tensor([[NONE if boxed else FOREGROUND]])
    prompts = Prompts(point, label, box, torch.tensor([boxed]))
    embedding = model(photograph.images)
    answer = model.answer(embedding, torch.zeros(1, dtype=torch.long), prompts, several=True)
    return at_photograph(answer.logits.transpose(0, 1), photograph).numpy()


def agree(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape == (3, 300, 451) and 0.02 < one.mean() < 0.98
    assert (one != other).mean() < 1e-4  # logits within rounding of zero


@torch.inference_mode()
def test_masks_equal_those_of_sam_predictor_and_sam_model(
    tmp_path: Path, checkpoint: Path, sam_file: Path, photograph
) -> None:
    model = load_segmenter(checkpoint)
    sam = peer_sam(model.encoder.config)
    sam.load_state_dict(torch.load(sam_file, weights_only=True), strict=True)
    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(chelsea())
    export(checkpoint, "hf-sam", tmp_path / "hf")
    hugging = transformers.SamModel.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.SamProcessor.from_pretrained(tmp_path / "hf")
    for boxed in (False, True):
        expected = ours(model, photograph, boxed)
        asked = {"box": BOX} if boxed else {"point_coords": POINT, "point_labels": np.array([1])}
        agree(predictor.predict(**asked, multimask_output=True)[0], expected)
        given = {"input_boxes": [[BOX.tolist()]]} if boxed else {"input_points": [[POINT[0].tolist()]]}
        inputs = processor(Image.fromarray(chelsea()), return_tensors="pt", **given)
        out = hugging(**inputs, multimask_output=True)
        masks = processor.image_processor.post_process_masks(
            out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        agree(masks[0][0].numpy(), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_automatic_mask_generator_finds_our_masks_at_each_point_of_its_grid(
    tmp_path: Path, checkpoint: Path, sam_file: Path, photograph, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [
        each for each in python_blocks(ROOT / "docs" / "segmentation.md") if "SamAutomaticMaskGenerator" in each
    ]
    shutil.copy(sam_file, tmp_path)
    Image.fromarray(chelsea()).save(tmp_path / "PHOTO.png")
    monkeypatch.chdir(tmp_path)
    # The scores of random weights mean nothing: every candidate is let through.
    limits = "points_per_side=32, pred_iou_thresh=0.5, stability_score_thresh=0.8"
    assert limits in block
    none = "points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1.0"
    names: dict[str, Any] = {}
    exec(block.replace(limits, none), names)
    found, model = names["annotations"], load_segmenter(checkpoint)
    assert len(found) == 3 * 3 * 3 and len({tuple(one["point_coords"][0]) for one in found}) == 3 * 3
    for one in found[::9]:
        expected, mask = ours(model, photograph, False, np.array(one["point_coords"])), decode(one["segmentation"])
        assert min((mask != each).mean() for each in expected) < 1e-4


@torch.inference_mode()
def test_demo_answers_a_box_and_a_negative_click_as_sam_predictor_does(checkpoint: Path, sam_file: Path) -> None:
    demo = open_sam(checkpoint, open_weights(checkpoint))
    sam = peer_sam(demo.model.encoder.config)
    sam.load_state_dict(torch.load(sam_file, weights_only=True))
    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(chelsea())
    embedded = demo.embed(Image.fromarray(chelsea()))

    box = Marks(box=(60.0, 30.0, 400.0, 280.0))
    reply = demo.answer(embedded, box)
    masks, scores, logits = predictor.predict(box=BOX, multimask_output=True)
    best_first = np.argsort(-scores)
    assert reply.scores == pytest.approx(scores[best_first].tolist(), abs=1e-4)
    agree(demo.masks(embedded, reply), masks[best_first])

    both = demo.answer(embedded, box._replace(points=((150.0, 200.0, BACKGROUND),)), reply)
    # segment-anything scales the corners of pixels, we their centres.
    place = np.array([[150.0, 200.0]]) + 0.5 - 0.5 * np.array([451 / 1024, 300 / 681])
    given = {"box": BOX, "point_coords": place, "point_labels": np.array([0])}
    masks, scores, _ = predictor.predict(**given, mask_input=logits[best_first[:1]], multimask_output=False)
    assert both.scores == pytest.approx(scores.tolist(), abs=1e-4)
    assert (demo.masks(embedded, both) != masks).mean() < 1e-4
