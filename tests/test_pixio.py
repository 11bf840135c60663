"""Several class tokens, masks of cells, stochastic depth: what Pixio (Yang et al. 2025) adds to the autoencoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

import mae
from mae.distributed.launch import Topology
from mae.export.write import export
from mae.models.drop_path import draw_paths
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.masking import draw_masking
from mae.models.noise import uniform_noise
from mae.run.checkpoint_files import checkpoints
from mae.sam.convert import to_sam
from mae.train.optim import OptimConfig, build_optimizer
from tasks.train import train
from tests.exports import own_checkpoint, photograph
from tests.processes import SMALL
from tests.test_experiments import compose
from tests.test_model import model_of

transformers = pytest.importorskip("transformers")

PIXIO = {"class_tokens": 8, "positions": "learned", "mask_cell": 2}


def pixio_of(config: mae.MAEConfig, kind: str = "PixioModel"):
    """A model of transformers with random weights everywhere, norms and biases too."""
    settings = transformers.PixioConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        n_cls_tokens=config.class_tokens,
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    model = getattr(transformers, kind)(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def close(theirs: Tensor, ours: Tensor) -> None:
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("size", "millions"),
    [("vit_base", 86), ("vit_large", 303), ("vit_huge", 631), ("vit_1b", 1362), ("vit_5b", 5441)],
)
def test_sizes_have_the_published_parameter_counts(size: str, millions: int) -> None:
    config = compose(f"model={size}", "model.class_tokens=8", "model.positions=learned", "model.image_size=256").model
    with torch.device("meta"):
        encoder = mae.Encoder(config)
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6) == millions


@pytest.mark.parametrize("kind", ["PixioModel", "PixioBackbone"])
def test_folder_of_transformers_gives_the_same_features_and_gradients(tmp_path: Path, kind: str) -> None:
    config = model_of(**PIXIO).config
    theirs = pixio_of(config, kind)
    theirs.save_pretrained(tmp_path / "pixio")
    ours = mae.load(tmp_path / "pixio")
    assert type(ours) is mae.Encoder and (ours.config.class_tokens, ours.config.positions) == (8, "learned")
    images = torch.randn(2, 3, 32, 32)
    inner = theirs if kind == "PixioModel" else theirs.pixio
    expected, got = inner(images).last_hidden_state, ours.encode(images)
    close(expected.detach(), got.detach())
    for one in (expected, got):
        (one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum().backward()
    close(inner.embeddings.cls_token.grad, ours.cls_token.grad)
    close(inner.embeddings.patch_embeddings.projection.weight.grad, ours.patch_embed.proj.weight.grad)
    close(inner.layers[0].mlp.fc1.weight.grad, ours.blocks[0].mlp.fc1.weight.grad)


@pytest.mark.parametrize("decoder", [True, False])
def test_published_file_is_loaded_with_its_class_tokens(tmp_path: Path, decoder: bool) -> None:
    model = model_of(**PIXIO)
    state = model.state_dict() if decoder else mae.Encoder(model.config).state_dict()
    torch.save(state, tmp_path / "pixio.pth")
    heads = {"num_heads": 2, "norm_pix": True} | ({"decoder_num_heads": 2} if decoder else {})
    loaded = mae.load(tmp_path / "pixio.pth", **heads)
    assert loaded.config.class_tokens == 8 and isinstance(loaded, mae.MaskedAutoencoder) == decoder
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 8])
def test_export_is_loaded_by_both_classes_of_transformers_and_back(tmp_path: Path, tokens: int) -> None:
    model, source = own_checkpoint(tmp_path, class_tokens=tokens, positions="learned")
    card = json.loads(export(source, "hf-pixio", tmp_path / "pixio").read_text())
    assert card["verification"]["compared_with"].startswith("transformers")
    images, ours = photograph(model.config), model.encode(photograph(model.config))
    close(transformers.AutoModel.from_pretrained(tmp_path / "pixio").eval()(images).last_hidden_state, ours)
    backbone, report = transformers.PixioBackbone.from_pretrained(tmp_path / "pixio", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    close(backbone.eval()(images).feature_maps[0], rearrange(ours[:, tokens:], "b (h w) d -> b d h w", h=4))
    back = mae.load(tmp_path / "pixio")
    assert back.config.class_tokens == tokens and torch.equal(back.encode(images), ours)


@torch.no_grad()
def test_sam_encoder_of_one_window_equals_the_encoder_without_its_class_tokens() -> None:
    encoder = mae.Encoder(model_of(image_size=224, patch_size=16, depth=4, **PIXIO).config).eval()
    alone = mae.Encoder(encoder.config.model_copy(update={"class_tokens": 0})).eval()
    state = {name: value for name, value in encoder.state_dict().items() if name != "cls_token"}
    alone.load_state_dict(state | {"pos_embed": state["pos_embed"][:, 8:]})
    images = torch.randn(2, 3, 224, 224)
    converted = to_sam(encoder, image_size=224)
    alone.norm = torch.nn.Identity()
    close(alone.encode(images), converted.tokens(images).flatten(1, 2))


def test_sine_cosine_positions_of_class_tokens_are_zero_and_their_values_tell_them_apart() -> None:
    encoder = model_of(class_tokens=8)
    assert not encoder.pos_embed[:, :8].any()
    assert len(encoder.cls_token[0].detach().unique(dim=0)) == 8


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 3, 4]), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_masks_of_cells_are_those_of_the_published_procedure_with_the_same_numbers(
    rows, columns, cell, ratio, seed
) -> None:
    keep = int(rows * columns * (1 - ratio))
    if not 0 < keep < rows * columns:
        return
    size = (rows * cell, columns * cell)
    config = mae.MAEConfig(image_size=size, patch_size=1, mask_cell=cell, mask_ratio=ratio)
    noise = uniform_noise(seed, 0, torch.arange(4), config.patches)
    ids_keep, _, mask = draw_masking(noise, config)
    assert ids_keep.shape[1] == config.visible == keep * cell**2
    for numbers, got in zip(noise.view(4, *size).numpy(), mask.view(4, *size).numpy(), strict=True):
        of_cells = numbers[::cell, ::cell].ravel()
        visible = np.zeros(rows * columns)
        visible[np.argsort(of_cells, kind="stable")[:keep]] = 1
        assert np.array_equal(1 - got, visible.reshape(rows, columns).repeat(cell, 0).repeat(cell, 1))


def test_cells_with_equal_numbers_stay_whole() -> None:
    config = mae.MAEConfig(image_size=8, patch_size=1, mask_cell=4, mask_ratio=0.5)
    mask = draw_masking(torch.zeros(1, 64), config).mask.view(2, 4, 2, 4)
    assert torch.equal(mask.amin((1, 3)), mask.amax((1, 3)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"image_size": (96, 64)},
            "height 96 is 6 patches, which cells of mask_cell=4 do not divide. Nearest sizes: 64 or 128",
        ),
        ({"image_size": 64, "masking": "block"}, "masking=block draws shapes of its own: set mask_cell=1"),
        ({"image_size": 64, "mask_ratio": 0.9}, "leaves 0 of 16 patches visible: at least one cell has to be visible"),
    ],
)
def test_cells_that_do_not_fit_are_refused(fields, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        mae.MAEConfig(mask_cell=4, patch_size=16, **fields)


def test_loss_equals_a_few_independent_lines() -> None:
    model, images, noise = model_of(**PIXIO), torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    out = model(images, noise)
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    whole = model.reconstruct(images, noise).pred
    error = ((whole - target) ** 2).mean(-1)
    close((error * out.mask).sum() / out.mask.sum(), out.loss.detach())
    assert out.mask.sum() == 3 * 12


@pytest.mark.parametrize(("old", "now"), [(True, 1), (False, 0)])
def test_settings_of_earlier_versions_are_read(tmp_path: Path, old: bool, now: int) -> None:
    model, source = own_checkpoint(tmp_path, class_tokens=now)
    assert mae.MAEConfig(class_token=old).class_tokens == now  # pyright: ignore[reportCallIssue]
    stored = torch.load(source, weights_only=True)
    fields = {name: value for name, value in stored["mae"]["recipe"]["model"].items() if name != "mask_cell"}
    del fields["class_tokens"]
    stored["mae"]["recipe"]["model"] = fields | {"class_token": old}
    torch.save(stored, source)
    assert mae.load(source).config == model.config
    export(source, "timm", tmp_path / "new.safetensors")
    said = {"format": "pt", "config": json.dumps(fields | {"class_token": old})}
    save_file(load_file(tmp_path / "new.safetensors"), tmp_path / "encoder.safetensors", said)
    assert mae.load(tmp_path / "encoder.safetensors").config == model.config


def test_run_with_stochastic_depth_paints_probes_and_resumes(tmp_path: Path, built_in: Path) -> None:
    words = [
        f"runs={tmp_path}",
        f"data.root={built_in}",
        *SMALL,
        "model.depth=2",
        "task.drop_path=0.5",
        "data.workers=0",
    ]
    words += ["pictures_every=1", "online_probe.every=1", "online_probe.train_images=50", "online_probe.test_images=50"]
    for steps in (1, 2):
        train(compose(*words, "name=stopped", f"max_steps={steps}", "epochs=9"), Topology())
    assert len(list((tmp_path / "stopped" / "reconstructions").glob("*.png"))) >= 2


def test_run_that_is_older_than_the_settings_goes_on(tmp_path: Path, built_in: Path) -> None:
    words = [f"runs={tmp_path}", f"data.root={built_in}", "name=old", *SMALL, "data.workers=0", "val_every=null"]
    run = compose(*words, "max_steps=2")
    train(run, Topology())
    (checkpoint,) = checkpoints(run.run)
    stored = torch.load(checkpoint, weights_only=True)
    recipe = stored["mae"]["recipe"]
    for group, setting in (("model", "class_tokens"), ("model", "mask_cell"), ("optim", "decay_tokens")):
        del recipe[group][setting]
    recipe["model"]["class_token"] = True
    del recipe["task"]["drop_path"]
    torch.save(stored, checkpoint)
    train(compose(*words, "max_steps=3"), Topology())
    assert checkpoints(run.run)[0].stem == "step-00000003"
    for setting in ("model.class_tokens=0", "task.drop_path=0.1", "optim.decay_tokens=true"):
        with pytest.raises(mae.ConfigError, match=setting.partition("=")[0]):
            train(compose(*words, "max_steps=4", setting), Topology())


# Stochastic depth.


def dropping(rate: float = 0.5, **blocks) -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(model_of(depth=4).config, drop_path=rate)
    prepare_blocks(model.whole_blocks, BlocksConfig(**blocks))
    return model.train()


def test_stochastic_depth_is_a_function_of_the_noise_of_each_image_and_off_in_evaluation() -> None:
    model, images, noise = dropping(), torch.randn(6, 3, 32, 32), torch.rand(6, 16)
    whole = model(images, noise).pred
    assert torch.equal(model(images, noise).pred, whole)
    torch.testing.assert_close(torch.cat([model(images[:2], noise[:2]).pred, model(images[2:], noise[2:]).pred]), whole)
    mask = draw_masking(noise, model.config).mask
    with torch.no_grad():
        # Pictures and probes of a run that trains: other images, none of whose branches is left out.
        assert torch.equal(model.encode(images[:2]), model.encode(images[:2]))
        painted = model.reconstruct(images[:2], noise[:2]).pred
        torch.testing.assert_close(painted, model.eval().reconstruct(images[:2], noise[:2]).pred)
        model.train()(images, noise)
        given, evaluated = model(images, mask=mask).pred, model.eval()(images, noise).pred
    torch.testing.assert_close(given, evaluated)
    assert not torch.allclose(evaluated, whole.detach(), atol=1e-3)


def test_stochastic_depth_leaves_branches_out_at_its_rates_and_keeps_their_mean() -> None:
    model = dropping(0.3)
    draw_paths(model.blocks, uniform_noise(0, 0, torch.arange(20_000), 16))
    assert not hasattr(model.blocks[0].drop_path1, "factor")
    for number in (1, 2, 3):
        for branch in (model.blocks[number].drop_path1, model.blocks[number].drop_path2):
            assert (branch.factor == 0).float().mean() == pytest.approx(0.1 * number, abs=0.01)
            assert branch.factor.mean() == pytest.approx(1, abs=0.02)


def test_activation_checkpointing_leaves_out_the_same_branches() -> None:
    gradients = []
    for recompute in ("none", "all"):
        model = dropping(recompute=recompute)
        torch.manual_seed(1)
        model(torch.randn(6, 3, 32, 32), torch.rand(6, 16)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_tokens_and_positions_decay_when_asked() -> None:
    model = model_of(**PIXIO)
    decayed, others = build_optimizer(model.named_parameters(), OptimConfig(decay_tokens=True), lr=1).param_groups
    tokens = {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed"}
    assert tokens <= set(decayed["param_names"]) and all(
        name.endswith(("bias", "weight")) for name in others["param_names"]
    )
    assert tokens <= set(build_optimizer(model.named_parameters(), OptimConfig(), lr=1).param_groups[1]["param_names"])
