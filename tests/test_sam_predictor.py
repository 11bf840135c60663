"""What is trained here answers in segment-anything's SamPredictor and transformers' SamModel with the same masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea

from data.index.index import open_shards
from data.loader.mask_dataset import Frame, MaskDataset
from data.order.samplers import MicroBatch
from mae.export.write import export
from mae.formats.load_segmenter import load_segmenter
from mae.formats.segment_anything import peer_sam
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.models.pixels import Pixels
from mae.sam.config import SegmentConfig, build_segmenter
from mae.sam.scores import Photograph, at_photograph, photograph_of
from mae.sam.segmenter import FOREGROUND, NONE, Prompts, Segmenter
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


POINT, BOX = np.array([[230, 140]]), np.array([60, 30, 400, 280])  # pixels of the photograph


def ours(model: Segmenter, photograph: Photograph, boxed: bool) -> np.ndarray:
    """Returns the three masks, for the coordinates as segment-anything scales them."""
    transform = segment_anything.utils.transforms.ResizeLongestSide(1024)
    point = torch.from_numpy(transform.apply_coords(POINT, photograph.original)).float()[None]
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
def test_masks_equal_those_of_sam_predictor_and_sam_model(tmp_path: Path, checkpoint: Path, photograph) -> None:
    model = load_segmenter(checkpoint)
    export(checkpoint, "segment-anything", tmp_path / "sam.pth")
    sam = peer_sam(model.encoder.config)
    sam.load_state_dict(torch.load(tmp_path / "sam.pth", weights_only=True), strict=True)
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
