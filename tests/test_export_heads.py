"""Exported encoders under heads of other libraries: the code of docs/export.md, on real photographs."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import mae
from data.images.masks import decode
from mae.export.write import export
from tests.conftest import ROOT
from tests.documentation import python_blocks
from tests.exports import own_checkpoint, photograph

CLASSES, VOID = 11, 11
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def documented(word: str) -> str:
    """Returns the block of Python in docs/export.md that holds a word."""
    (block,) = [each for each in python_blocks(ROOT / "docs" / "export.md") if word in each]
    return block


def members(tar: Path, count: int) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened.getmembers()[:count]}  # pyright: ignore


@pytest.fixture(scope="module")
def streets(real_images: Path) -> tuple[Tensor, Tensor]:
    """Two photographs of CamVid, 96 x 128, normalised, and their maps of classes."""
    found = members(real_images / "camvid" / "camvid-train-000000.tar", 4)
    opened = {name: Image.open(io.BytesIO(data)) for name, data in found.items()}
    images = [image.convert("RGB").resize((128, 96)) for name, image in opened.items() if name.endswith("jpg")]
    maps = [each.resize((128, 96), Image.Resampling.NEAREST) for name, each in opened.items() if name.endswith("png")]
    pixels = [rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w") / 255 for image in images]
    labels = torch.from_numpy(np.stack([np.array(each, np.int64) for each in maps]))
    return torch.stack([(one - MEAN) / STD for one in pixels]), labels


def gradients(*modules: Any) -> list[Tensor | None]:
    return [parameter.grad for module in modules for parameter in module.parameters()]


def train(names: dict[str, Any], code: str, parameters: list[Any]) -> list[float]:
    """Runs the documented code once a step, with Adam; returns the losses."""
    optimizer, losses = torch.optim.Adam(parameters, 1e-3), []
    for _ in range(6):
        exec(code, names)
        optimizer.zero_grad()
        names["loss"].backward()
        optimizer.step()
        losses.append(float(names["loss"].detach()))
    return losses


def test_linear_head_on_a_timm_folder_learns_classes_of_real_photographs(
    streets: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = own_checkpoint(tmp_path)
    export(source, "timm-folder", tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = dict(zip(("images", "labels"), streets, strict=True))
    block = documented("forward_intermediates")
    exec(block, names)
    encoder, head = names["encoder"], names["head"]
    expected = model.at((96, 128)).encode(names["images"])[:, 1:].detach()
    maps = rearrange(names["tokens"], "b d h w -> b (h w) d").detach()
    assert (maps - expected).abs().max() < 0.05 * expected.abs().max()  # timm resizes positions a little otherwise
    step = block[block.index("(tokens,) = ") :]
    losses = train(names, step, [*encoder.parameters(), *head.parameters()])
    assert losses[-1] < 0.9 * losses[0] and all(one is not None and one.abs().max() > 0 for one in gradients(head))
    assert sum(one is not None and bool(one.any()) for one in gradients(encoder)) > 20


def test_upernet_of_transformers_learns_on_the_exported_backbone(
    streets: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    model, source = own_checkpoint(tmp_path, depth=4)
    export(source, "hf-pixio", tmp_path / "pixio")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = dict(zip(("images", "labels"), streets, strict=True))
    block = documented("UperNetForSemanticSegmentation")
    exec(block, names)
    upernet = names["model"]
    ours = model.state_dict()["blocks.3.mlp.fc1.weight"]
    theirs = [value for value in upernet.backbone.state_dict().values() if value.shape == ours.shape]
    assert any(torch.equal(value, ours) for value in theirs)
    assert upernet(names["images"]).logits.shape == (2, CLASSES, 96, 128)
    losses = train(names, block[block.rindex("loss = ") :], list(upernet.parameters()))
    assert losses[-1] < 0.9 * losses[0]
    assert sum(one is not None and bool(one.any()) for one in gradients(upernet.backbone)) > 40


def test_mask_rcnn_with_a_simple_feature_pyramid_takes_a_step_on_real_objects(
    real_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = own_checkpoint(tmp_path, patch_size=16, image_size=64)
    export(source, "timm-folder", tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    found = members(real_images / "coco_sa1b" / "coco_sa1b-val-000000.tar", 2)
    pixels, objects = (next(data for name, data in found.items() if name.endswith(end)) for end in ("jpg", "json"))
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(pixels)).convert("RGB"))) / 255
    masks = np.stack([decode(one["segmentation"]) for one in json.loads(objects)["annotations"]])
    sides = [(np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))) for mask in masks]
    boxes = torch.tensor([[x[0], y[0], x[-1] + 1, y[-1] + 1] for x, y in sides], dtype=torch.float)
    target = {
        "boxes": boxes,
        "labels": torch.ones(len(boxes), dtype=torch.long),
        "masks": torch.from_numpy(masks).byte(),
    }
    names: dict[str, Any] = {"photographs": [rearrange(image, "h w c -> c h w")], "targets": [target]}
    torch.manual_seed(0)
    exec(documented("SimpleFeaturePyramid").replace("min_size=480", "min_size=128"), names)
    strides = [level.shape[-1] for level in names["model"].backbone(torch.zeros(1, 3, 64, 64)).values()]
    assert strides == [16, 8, 4, 2]
    losses = names["losses"]
    assert {"loss_mask", "loss_box_reg", "loss_rpn_box_reg"} <= losses.keys()
    torch.stack([*losses.values()]).sum().backward()
    assert sum(one is not None and bool(one.any()) for one in gradients(names["vit"])) > 20


@torch.inference_mode()
@pytest.mark.parametrize("class_tokens", [0, 1])
def test_detectron2_export_computes_the_encoder_without_class_token_in_vitdet(
    tmp_path: Path, class_tokens: int
) -> None:
    """transformers' VitDet is detectron2's ViT under other names; it always drops a first position."""
    transformers = pytest.importorskip("transformers")
    model, source = own_checkpoint(tmp_path, class_tokens=class_tokens)
    export(source, "detectron2", tmp_path / "vitdet.pth")
    written = torch.load(tmp_path / "vitdet.pth", weights_only=True)["model"]
    theirs = {
        "backbone.net.": "",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.projection",
        "blocks.": "encoder.layer.",
        ".attn.": ".attention.",
    }
    state = {}
    for key, value in written.items():
        for ours, other in theirs.items():
            key = key.replace(ours, other)
        state[key] = value
    if not class_tokens:
        positions = state["embeddings.position_embeddings"]
        state["embeddings.position_embeddings"] = torch.cat([positions[:, :1], positions], 1)
    size = {"image_size": 32, "pretrain_image_size": 32, "patch_size": 8}
    config = transformers.VitDetConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **size)
    peer = transformers.VitDetBackbone(config).eval()
    peer.load_state_dict(state)

    alone = mae.Encoder(model.config.model_copy(update={"class_tokens": 0})).eval()
    kept = {key: value for key, value in model.state_dict().items() if key in alone.state_dict()}
    alone.load_state_dict(kept | {"pos_embed": model.pos_embed[:, class_tokens:]})
    images = photograph(model.config)
    (maps,) = peer(images).feature_maps
    features = alone.norm(rearrange(maps, "b d h w -> b (h w) d"))
    torch.testing.assert_close(features, alone.encode(images), rtol=1e-4, atol=1e-5)
