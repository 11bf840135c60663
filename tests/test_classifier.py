"""The classifier is timm's Vision Transformer, its rates are timm's, and what it is loaded from is what it is."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

import mae
from mae.export.write import export
from mae.formats.available import FORMATS
from mae.formats.hf_vit import class_settings
from mae.models.classifier import Classifier, Pool, build_classifier
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.vit import LayerNorm
from mae.train.finetuning import vit_layer
from mae.train.layer_decay import build_layer_decayed_optimizer
from mae.train.optim import OptimConfig

CONFIG = mae.MAEConfig(image_size=(32, 32), patch_size=8, width=48, depth=3, num_heads=3, decoder_width=32)
POOLS: list[Pool] = ["patches", "class_token"]


def timms(pool: Pool, drop_path: float = 0.0) -> VisionTransformer:
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=7,
        global_pool="avg" if pool == "patches" else "token",
        drop_path_rate=drop_path,
        norm_layer=LayerNorm,
    )


def with_large_head(model: Classifier) -> Classifier:
    """At its start the head is next to zero, and every comparison would be of zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model


@pytest.mark.parametrize("pool", POOLS)
def test_classifier_scores_and_gradients_equal_those_of_timm(pool: Pool) -> None:
    torch.manual_seed(0)
    ours, theirs = with_large_head(Classifier(CONFIG, 7, pool)), timms(pool)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 6, 1])
    scores = [model(images) for model in (ours, theirs)]
    assert torch.allclose(*scores, atol=1e-5)
    for found in scores:
        torch.nn.functional.cross_entropy(found, labels).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None
        assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-5), name


@pytest.mark.parametrize("pool", POOLS)
def test_layer_decay_equals_timms_with_each_parameter_in_one_group(pool: Pool) -> None:
    ours, theirs = Classifier(CONFIG, 7, pool), timms(pool)
    config = OptimConfig(layer_decay=0.65, weight_decay=0.05)
    optimizer = build_layer_decayed_optimizer(ours.named_parameters(), config, 1e-3, vit_layer, 3)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in ours.named_parameters())
    groups = param_groups_layer_decay(
        theirs, weight_decay=0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65
    )
    name_of = {parameter: name for name, parameter in theirs.named_parameters()}
    expected = {
        name_of[parameter]: (pytest.approx(1e-3 * group["lr_scale"]), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    found = {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }
    assert found == expected


def test_drop_path_rates_rise_with_depth_as_in_timm() -> None:
    ours, theirs = Classifier(CONFIG, 7, drop_path=0.3), timms("patches", drop_path=0.3)
    rates = [getattr(block.drop_path2, "rate", 0.0) for block in ours.blocks]
    assert rates == pytest.approx([getattr(block.drop_path2, "drop_prob", 0.0) for block in theirs.blocks])
    assert rates[-1] == pytest.approx(0.3) and all(one < other for one, other in pairwise(rates))


def test_drop_path_under_activation_checkpointing_gives_equal_gradients() -> None:
    gradients = []
    for recompute in ("none", "all"):
        torch.manual_seed(0)
        model = with_large_head(Classifier(CONFIG, 7, drop_path=0.5))
        prepare_blocks(list(model.blocks), BlocksConfig(recompute=recompute))
        torch.manual_seed(1)
        model(torch.randn(8, 3, 32, 32), torch.rand(8, 1)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_new_classifier_has_the_encoder_weights_and_trainable_positions() -> None:
    source = mae.MaskedAutoencoder(CONFIG)
    model = build_classifier(source, 7)
    own, pretrained = model.state_dict(), source.state_dict()
    assert set(own) - set(pretrained) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(torch.equal(own[name], pretrained[name]) for name in own if name in pretrained)
    assert model.pos_embed.requires_grad and not source.pos_embed.requires_grad
    assert 1e-5 < own["head.weight"].std() < 3e-5


@pytest.mark.parametrize(("to", "suffix"), [("timm", ".safetensors"), ("facebook", ".pth")])
@pytest.mark.parametrize("pool", POOLS)
def test_exported_classifier_loads_with_its_head(tmp_path: Path, pool: Pool, to: str, suffix: str) -> None:
    config = CONFIG.model_copy(update={"width": 192})  # of known heads
    model = with_large_head(Classifier(config, 7, pool)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "finetuned.pth")
    export(tmp_path / "finetuned.pth", to, tmp_path / f"out{suffix}")
    images = torch.randn(2, 3, 32, 32)
    again = mae.load(tmp_path / f"out{suffix}")
    assert isinstance(again, Classifier) and again.pool == pool
    assert torch.allclose(again(images), model(images), atol=1e-6)


def test_export_of_a_classifier_of_patches_to_hf_vit_raises_config_error(tmp_path: Path) -> None:
    model = Classifier(CONFIG.model_copy(update={"width": 192}), 7)
    torch.save({"model": model.state_dict()}, tmp_path / "finetuned.pth")
    with pytest.raises(mae.ConfigError, match="the mean of the patches, for which") as refused:
        export(tmp_path / "finetuned.pth", "hf-vit", tmp_path / "folder")
    named = re.search(r"choose --to ([\w-]+), .* or ([\w, ]+) or ([\w]+);", str(refused.value))
    assert named is not None
    assert {named[1], *named[2].split(", "), named[3]} == {to for to, fmt in FORMATS.items() if fmt.heads} - {"hf-vit"}
    with pytest.raises(mae.ConfigError, match="holds no decoder"):
        export(tmp_path / "finetuned.pth", "hf-vitmae", tmp_path / "folder")


@pytest.mark.parametrize(
    ("to", "out", "pool"),
    [
        ("timm", "x.safetensors", "patches"),
        ("timm-folder", "folder", "patches"),
        ("hf-vit", "folder", "class_token"),
        ("facebook", "x.pth", "patches"),
    ],
)
def test_exported_classifier_names_its_classes(tmp_path: Path, to: str, out: str, pool: Pool) -> None:
    config, names = CONFIG.model_copy(update={"width": 192}), ["ant", "bee", "cät"]
    model = with_large_head(Classifier(config, 3, pool)).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    run = {"step": 5, "recipe": {"model": model.config.model_dump(mode="json")}, "classes": names}
    torch.save({"mae": run, "state_dict": state}, tmp_path / "step-00000005.ckpt")
    card = json.loads(export(tmp_path / "step-00000005.ckpt", to, tmp_path / out).read_text())
    assert card["classes"] == names and card["verification"]["difference"] <= 1e-4
    again = mae.load(tmp_path / out)
    assert isinstance(again, Classifier) and again.class_names == ([] if to == "facebook" else names)
    if to == "timm-folder":
        peer = timm.create_model(f"local-dir:{tmp_path / out}", pretrained=True)
        assert peer.pretrained_cfg["label_names"] == names and peer.num_classes == 3
    if to == "hf-vit":
        peer = transformers.ViTForImageClassification.from_pretrained(tmp_path / out)
        assert peer.config.id2label == dict(enumerate(names)) and peer.config.label2id["bee"] == 1
        model.class_names = ["crane", "bee", "crane"]
        assert class_settings(model)["label2id"] == {"crane (0)": 0, "bee": 1, "crane (2)": 2}
