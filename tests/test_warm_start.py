"""A warm start takes weights of another size, of other patches, channels or decoder, and says what it did with them."""

from pathlib import Path

import pytest
import torch

import mae
from mae.export.write import export
from mae.formats.load_segmenter import initialise_segmenter
from mae.formats.warm_start import initialise_from
from mae.models.classifier import Classifier, build_classifier
from mae.models.vit import sincos_positions
from mae.sam.convert import to_sam
from mae.sam.segmenter import Segmenter
from tests.exports import SMALL, own_checkpoint
from tests.test_sam_conversion import small_sam, whole_sam

ENCODER = ("patch_embed", "cls_token", "blocks", "norm")


def fresh(**fields) -> mae.MaskedAutoencoder:
    return mae.MaskedAutoencoder(mae.MAEConfig.model_validate(SMALL | fields)).eval()


def taken_over(model: mae.MaskedAutoencoder, source: mae.Encoder, *parts: str) -> bool:
    state = source.state_dict()
    own = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    return bool(own) and all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        (
            {"image_size": 64},
            ["images of 32 x 32 pixels in 4 x 4 patches -> 64 x 64 pixels in 8 x 8 patches: positions are made anew"],
        ),
        (
            {"image_size": 64, "patch_size": 16},
            [
                "64 x 64 pixels in 4 x 4 patches: positions are as they are",
                "patch size 8 -> 16: the patch embedding is resized by pseudo-inverse, the prediction of pixels bicub",
            ],
        ),
        ({"in_channels": 1}, ["channels 3 -> 1: the weights of the patch embedding are summed"]),
        ({"in_channels": 5}, ["channels 3 -> 5: the weights of the patch embedding are repeated in turn, times 3/5"]),
        ({"norm_pix": False}, ["its decoder was trained with norm_pix=true: another target"]),
    ],
    ids=str,
)
def test_warm_start_resamples_weights_and_says_so(tmp_path: Path, fields, said: list[str]) -> None:
    source, path = own_checkpoint(tmp_path)
    model = fresh(**fields)
    lines = initialise_from(model, path)
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))
    config = model.config
    assert torch.equal(model.pos_embed, sincos_positions(64, config.grid, 1))  # exact for any grid
    expected = source.at(config.image_size, patch_size=config.patch_size, in_channels=config.in_channels)
    assert taken_over(model, expected, *ENCODER, "decoder_embed", "decoder_blocks", "decoder_pred", "mask_token")
    assert not model.pos_embed.requires_grad


def test_warm_start_of_learned_positions_resizes_them(tmp_path: Path) -> None:
    source, path = own_checkpoint(tmp_path, positions="learned")
    model = fresh(positions="learned", image_size=(64, 32))
    assert "positions are resized bicubically" in initialise_from(model, path)[0]
    assert taken_over(model, source.at((64, 32)), "pos_embed", "decoder_pos_embed")
    with pytest.raises(mae.ConfigError, match=r"has learned positions.*set model\.positions=learned"):
        initialise_from(fresh(), path)


def test_warm_start_without_a_decoder_leaves_the_models_own(tmp_path: Path) -> None:
    source, path = own_checkpoint(tmp_path)
    export(path, "hf-vit", tmp_path / "vit")
    model = fresh(image_size=48, decoder_width=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lines = initialise_from(model, tmp_path / "vit")
    assert lines[-1] == "there is no decoder in it: the decoder starts from random weights"
    assert taken_over(model, source, *ENCODER)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "decoder" in key)


def test_warm_start_from_a_classifier_takes_its_encoder(tmp_path: Path) -> None:
    source, _ = own_checkpoint(tmp_path)
    for pool in ("patches", "class_token"):
        classifier = build_classifier(source, 7, pool)
        torch.save({"model": classifier.state_dict()}, tmp_path / "finetuned.pth")
        model = fresh(positions="learned")
        lines = initialise_from(model, tmp_path / "finetuned.pth")
        assert "left out: its head of 7 classes" in lines
        assert (pool == "patches") == any("the norm of the tokens starts afresh" in line for line in lines)
        assert taken_over(model, classifier, *ENCODER[:3], "pos_embed")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 96}, "width 64 there and 96 here. Set model.width=64$"),
        ({"num_heads": 8}, "num_heads 4 there and 8 here. Set model.num_heads=4$"),
        ({"mlp_ratio": 3.0}, "mlp_ratio 4.0 there and 3.0 here"),
        ({"class_tokens": 0}, "class_tokens 1 there and 0 here. Set model.class_tokens=1$"),
        ({"decoder_width": 64}, "decoder_width 32 there.*or take its encoder alone: python -m mae.export"),
        ({"decoder": "cross"}, "decoder self there and cross here"),
    ],
    ids=str,
)
def test_warm_start_of_another_architecture_names_the_settings(tmp_path: Path, fields, said: str) -> None:
    source, path = own_checkpoint(tmp_path)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    files = [path] if "num_heads" in fields else [path, tmp_path / "bare.pth"]
    for file in files:
        with pytest.raises(mae.CheckpointError, match=f"another architecture: {said}"):
            initialise_from(fresh(**fields), file)


def test_bare_weights_of_a_rectangle_are_told_by_their_table(tmp_path: Path) -> None:
    source, _ = own_checkpoint(tmp_path, image_size=(16, 64))  # as many patches as 32 x 32
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    model = fresh()
    assert initialise_from(model, tmp_path / "bare.pth")[0].startswith("images of 16 x 64 pixels in 2 x 8 patches")
    assert taken_over(model, source, *ENCODER)


SAM = {"image_size": 160, "window": 4, "out_channels": 32}


def test_sam_starts_from_a_classifier(tmp_path: Path) -> None:
    source, _ = own_checkpoint(tmp_path, patch_size=16, image_size=64, depth=4)
    classifier = build_classifier(source, 7)
    torch.save({"model": classifier.state_dict()}, tmp_path / "finetuned.pth")
    model = Segmenter(to_sam(source, **SAM))
    with torch.no_grad():
        model.encoder.blocks[0].attn.qkv.weight.zero_()
    assert initialise_segmenter(model, tmp_path / "finetuned.pth") == ["left out: its head of 7 classes"]
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_sam_starts_from_a_sam_of_another_size_and_channels(tmp_path: Path) -> None:
    sam = whole_sam()  # of 160 x 160
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    theirs = mae.load_segmenter(tmp_path / "sam.pth")
    model = Segmenter(mae.SamEncoder(theirs.encoder.config.model_copy(update={"image_size": (320, 320)})))
    lines = initialise_segmenter(model, tmp_path / "sam.pth")
    assert lines == [
        "images of 160 x 160 -> 320 x 320 pixels: positions, and relative positions of global blocks, are resized"
    ]
    expected = theirs.at(320).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    torch.save(small_sam(out_channels=32).state_dict(), tmp_path / "encoder.pth")
    grey = Segmenter(mae.SamEncoder(small_sam(out_channels=32).config.model_copy(update={"in_channels": 1})))
    assert "channels 3 -> 1" in initialise_segmenter(grey, tmp_path / "encoder.pth")[-1]


@pytest.mark.parametrize("start", ["autoencoder", "sam"])
def test_warm_start_on_images_of_another_mean_says_both(tmp_path: Path, start: str) -> None:
    source, own = own_checkpoint(tmp_path, patch_size=16, image_size=64, depth=4)
    foreign = tmp_path / "foreign.pth"
    export(own, "facebook", foreign)
    model = fresh(patch_size=16, image_size=64, depth=4) if start == "autoencoder" else Segmenter(to_sam(source, **SAM))
    initialise = initialise_from if start == "autoencoder" else initialise_segmenter

    def said(path: Path, mean: list[float], std: list[float]) -> list[str]:
        return [line for line in initialise(model, path, (tuple(mean), tuple(std))) if "data.mean" in line]

    mean, std, imagenet = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3], ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert said(own, mean, std) == said(foreign, *imagenet) == []
    (line,) = said(own, *imagenet)
    theirs, ours = "data.mean=[0.3,0.4,0.5] data.std=[0.2,0.25,0.3]", "[0.485,0.456,0.406] and [0.229,0.224,0.225]"
    assert theirs in line and f"this run's have {ours}" in line
    (line,) = said(own, [0.4], [0.25])
    assert "this run's have [0.4] and [0.25]" in line
    (line,) = said(foreign, mean, std)
    assert "does not say its mean and deviation" in line and "this run has [0.3,0.4,0.5]" in line


def test_classifier_built_from_a_classifier_keeps_the_head_if_asked() -> None:
    first = Classifier(fresh().config, 3)
    assert torch.equal(build_classifier(first, 3, keep_head=True).head.weight, first.head.weight)
    other = build_classifier(first, 5)
    assert other.head.weight.shape[0] == 5 and torch.equal(other.fc_norm.weight, first.fc_norm.weight)
    token = build_classifier(first, 3, "class_token")
    assert torch.equal(token.norm.weight, torch.ones(64)) and torch.equal(token.pos_embed, first.pos_embed)
