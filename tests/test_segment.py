"""Fine-tuning in the manner of SAM through train.py: exact resume, what learns, what is kept, what comes out."""

import json
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import mae
from mae.distributed.launch import Topology
from mae.errors import CheckpointError, ConfigError
from mae.export.write import export
from mae.formats.load_segmenter import initialise_decoder, load_segmenter
from mae.formats.sam_names import example_prompts
from mae.formats.segment_anything import peer_sam
from mae.models.config import MAEConfig
from mae.models.execution import BlocksConfig
from mae.run.checkpoint_files import newest_valid, read_own
from mae.run.checkpoint_writer import write_checkpoint
from mae.sam.config import SegmentConfig, build_segmenter, set_trainable
from mae.sam.embedding_cache import TokenCache
from mae.sam.encoder import SamEncoder
from mae.sam.pictures import LABEL_COLOURS
from mae.sam.segmentation import sam_layer
from mae.sam.segmenter import Segmenter
from mae.train.layer_decay import build_layer_decayed_optimizer
from mae.train.optim import OptimConfig
from mae.train.schedule import derive_schedule
from tasks.evaluate import launch
from tasks.relevance_eval import RelevanceProbe, evaluate_relevance
from tasks.segment import Segment, initial_segmenter
from tasks.segment_eval import SegmentProbe, before, evaluate_segmentation
from tasks.train import train
from tests.conftest import ROOT
from tests.exports import own_checkpoint
from tests.masked_photos import jpeg, record, shapes, shards_of_shapes, write_tar
from tests.processes import assert_same_run, kill, losses, run, start, state, wait_for_checkpoint
from tests.test_experiments import compose
from tests.test_sam import randomised

SMALL = (
    "task=segment",
    "optim=sam",
    "optim.warmup_steps=3",
    "model.width=48",
    "model.depth=2",
    "model.num_heads=3",
    "model.patch_size=16",
    "task.image_size=64",
    "task.window=2",
    "task.global_blocks=[1]",
    "task.out_channels=32",
    "task.masks_per_image=2",
    "task.clicks=1",
    "task.drop_path=0.3",
    "global_batch=4",
    "micro_batch=2",
    "max_steps=16",
    "val_every=5",
    "log_every=1",
    "trainer=cpu",
    "precision=32-true",
    "checkpoint.every_steps=5",
)

CONFIG = MAEConfig.model_validate({"width": 48, "depth": 2, "num_heads": 3, "image_size": 64})


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of_shapes(tmp_path_factory.mktemp("shapes"))


def words(runs: Path, shapes: Path, *overrides: str) -> list[str]:
    return [f"runs={runs}", f"data.path={shapes}", "data.workers=0", *SMALL, *overrides]


def trained(runs: Path, shapes: Path, *overrides: str) -> Path:
    """A run in this process."""
    torch.set_num_threads(1)
    config = compose(*words(runs, shapes, *overrides))
    train(config, Topology(rank=0, ranks=1, devices=1, nodes=1))
    return config.run


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory, shapes_folder: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), shapes_folder, "name=whole")


def test_killed_segment_run_resumes_to_the_uninterrupted_run(
    tmp_path: Path, shapes_folder: Path, uninterrupted_run: Path
) -> None:
    """Drop path, choice of masks, clicks and noise of boxes are drawn again as they were; across an epoch's edge."""
    command = [sys.executable, "train.py", "experiment=digits_tiny", *words(tmp_path, shapes_folder, "name=killed")]
    process = start(command)
    wait_for_checkpoint(process, tmp_path / "killed")
    kill(process)
    newest = newest_valid(tmp_path / "killed")
    assert newest is not None and newest.stem < "step-00000016"
    run(command)
    assert_same_run(tmp_path / "killed", uninterrupted_run)


def test_resume_with_other_clicks_raises_config_error(uninterrupted_run: Path, shapes_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.clicks"):
        trained(uninterrupted_run.parent, shapes_folder, "name=whole", "task.clicks=2")


def test_segment_run_starts_from_a_masked_autoencoder_or_a_segment_run(tmp_path: Path, shapes_folder: Path) -> None:
    fields = {"width": 48, "num_heads": 3, "patch_size": 16, "image_size": 64}
    source, file = own_checkpoint(tmp_path, **fields)
    tiny = ("optim.base_lr=1e-9", "max_steps=1", f"init_from={file}")
    folder = trained(tmp_path, shapes_folder, "name=warm", *tiny)
    assert (folder / "summary.json").is_file()
    encoder = load_segmenter(folder).encoder
    assert torch.allclose(encoder.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight, atol=1e-6)
    # From there another run, of the whole model.
    again = trained(tmp_path, shapes_folder, "name=again", *tiny[:2], f"init_from={folder}")
    one, other = load_segmenter(folder).state_dict(), load_segmenter(again).state_dict()
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    with pytest.raises(ConfigError, match="another encoder: width 48 there, 96 here"):
        trained(tmp_path, shapes_folder, "name=other", *tiny, "model.width=96")


# What it starts from.


@torch.inference_mode()
def test_decoder_from_a_published_sam_answers_as_that_sam(tmp_path: Path) -> None:
    """Takes random weights in segment-anything's own classes: its encoder in one file, the whole SAM in another."""
    pytest.importorskip("segment_anything")
    model, task = segmenter()
    sam = peer_sam(model.encoder.config)
    randomised(sam)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    torch.save(sam.image_encoder.state_dict(), tmp_path / "encoder.pth")
    wanted = task.model_copy(update={"decoder_from": tmp_path / "sam.pth"})
    started = initial_segmenter(CONFIG, wanted, BlocksConfig(), str(tmp_path / "encoder.pth")).eval()
    images, row = torch.randn(1, 3, 64, 64), torch.zeros(1, dtype=torch.long)
    embedding, places = sam.image_encoder(images), sam.prompt_encoder.get_dense_pe()
    point, box = example_prompts(64)
    for prompts, points, boxes in ((point, (point.points, point.labels), None), (box, None, box.boxes)):
        asked = sam.prompt_encoder(points, boxes, None)
        logits, ious = sam.mask_decoder(embedding, places, *asked, multimask_output=True)
        answer = started.answer(started(images), row, prompts, several=True)
        torch.testing.assert_close(answer.logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        torch.testing.assert_close(answer.ious, ious, rtol=1e-4, atol=1e-4)


def test_decoder_from_reads_what_whole_sams_are_kept_in_and_refuses_other_files(
    tmp_path: Path, uninterrupted_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(uninterrupted_run, "segment-anything", tmp_path / "sam.pth")
    export(uninterrupted_run, "hf-sam", tmp_path / "hf")
    expected = load_segmenter(uninterrupted_run).other_parts()
    model, task = segmenter()
    for source in (uninterrupted_run, tmp_path / "sam.pth", tmp_path / "hf"):
        wanted = task.model_copy(update={"decoder_from": source})
        started = initial_segmenter(CONFIG, wanted, BlocksConfig(), None).other_parts()
        assert all(torch.equal(started[key], value) for key, value in expected.items())
        assert f"prompt encoder and mask decoder start from those of {source}" in capsys.readouterr().out
    torch.save(model.encoder.state_dict(), tmp_path / "bare.pth")
    _, autoencoder = own_checkpoint(tmp_path)
    for source in (tmp_path / "bare.pth", autoencoder):
        with pytest.raises(CheckpointError, match=r"task\.decoder_from=.* holds no prompt encoder and mask decoder"):
            initialise_decoder(model, source)
    wide, _ = segmenter(out_channels=64)
    with pytest.raises(CheckpointError, match=r"has another .*: set task\.out_channels=32 as there, which is 64 here"):
        initialise_decoder(wide, tmp_path / "sam.pth")


@pytest.mark.slow
def test_frozen_decoder_stays_until_a_second_run_trains_all(
    tmp_path: Path, shapes_folder: Path, uninterrupted_run: Path
) -> None:
    """Resumes and evaluates the first run without the files that it started from."""
    shutil.copytree(uninterrupted_run, tmp_path / "sam")
    staged = ("name=first", "task.decoder=frozen", f"task.decoder_from={tmp_path / 'sam'}", "checkpoint.every_steps=2")
    trained(tmp_path, shapes_folder, *staged, "max_steps=2")
    shutil.rmtree(tmp_path / "sam")
    first = trained(tmp_path, shapes_folder, *staged, "max_steps=4")
    source, frozen = load_segmenter(uninterrupted_run), load_segmenter(first)
    assert all(torch.equal(value, frozen.other_parts()[key]) for key, value in source.other_parts().items())
    fresh = segmenter()[0].encoder.state_dict()
    assert not any(torch.equal(value, fresh[key]) for key, value in frozen.encoder.state_dict().items())

    second = load_segmenter(trained(tmp_path, shapes_folder, "name=second", f"init_from={first}", "max_steps=2"))
    moved = [key for key, value in frozen.other_parts().items() if not torch.equal(value, second.other_parts()[key])]
    assert any(key.startswith("mask_decoder.") for key in moved)


def test_evaluation_without_the_start_of_the_run_scores_the_trained_model_alone(
    tmp_path: Path, shapes_folder: Path, uninterrupted_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted_run, tmp_path / "start")
    folder = trained(tmp_path, shapes_folder, "name=moved", f"init_from={tmp_path / 'start'}", "max_steps=1")
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    probe = SegmentProbe(name="segment", clicks=[1], pictures=1, images=1, mask_input=False)
    scores = evaluate_segmentation(probe, folder, {"workers": 0}, 7, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert list(scores) == ["trained"] and "untrained" not in written
    assert "start does not exist" in written["left_out"]["untrained"]
    assert written["settings"]["mask_input"] is False and written["settings"]["multimask"] is True
    assert "scores of the trained model alone: what the run started from cannot be used" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "segment_pictures.png") as picture:
        assert picture.width == 3 * 304


def test_unusable_segment_settings_raise_config_error_before_a_run_folder(tmp_path: Path, shapes_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.in_channels=5, and task=segment takes RGB photographs"):
        trained(tmp_path, shapes_folder, "name=channels", "model.in_channels=5")
    with pytest.raises(ConfigError, match=r"task\.masks_at_a_time=1 .* trainer\.strategy=fsdp"):
        trained(tmp_path, shapes_folder, "name=fsdp", "task.masks_at_a_time=1", "trainer.strategy=fsdp")
    assert not (tmp_path / "channels").exists() and not (tmp_path / "fsdp").exists()


# What learns.


def segmenter(encoder: str = "all", **fields) -> tuple[Segmenter, SegmentConfig]:
    torch.manual_seed(0)
    small = {"image_size": 64, "window": 2, "global_blocks": (1,), "out_channels": 32}
    task = SegmentConfig.model_validate({"name": "segment", "encoder": encoder} | small | fields)
    model = build_segmenter(CONFIG, task, BlocksConfig())
    set_trainable(model, task)
    return model, task


def test_layer_decay_gives_each_sam_parameter_the_rate_of_its_layer() -> None:
    model, _ = segmenter()
    optimizer = build_layer_decayed_optimizer(model.named_parameters(), OptimConfig(layer_decay=0.8), 1.0, sam_layer, 2)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates["encoder.pos_embed"] == rates["encoder.patch_embed.proj.weight"] == pytest.approx(0.8**3)
    assert rates["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.8**2)
    assert rates["encoder.blocks.1.norm1.bias"] == pytest.approx(0.8)
    assert rates["encoder.neck.0.weight"] == rates["mask_decoder.iou_token.weight"] == 1.0
    decayed = {n for group in optimizer.param_groups if group["weight_decay"] for n in group["param_names"]}
    assert "encoder.blocks.0.attn.qkv.weight" in decayed and "encoder.blocks.0.attn.qkv.bias" not in decayed


def test_learning_rate_falls_to_a_tenth_at_each_milestone() -> None:
    optim = OptimConfig(base_lr=1.0, warmup_steps=250, milestones=(60_000 / 90_000, 86_666 / 90_000))
    schedule = derive_schedule(
        optim, samples=256, global_batch=256, micro_batch=None, ranks=1, epochs=1, max_steps=90_000
    )
    rates = [schedule.learning_rate(step) for step in (0, 125, 250, 59_999, 60_000, 86_665, 86_666, 89_999)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_lora_weights_learn_and_merge_into_the_same_function(tmp_path: Path, shapes_folder: Path) -> None:
    pytest.importorskip("peft")
    folder = trained(tmp_path, shapes_folder, "name=lora", "task.encoder=lora", "task.lora_rank=2", "max_steps=3")
    contents = read_own(newest_valid(folder))
    adapted, _ = segmenter("lora", lora_rank=2, clicks=1, masks_per_image=2, drop_path=0.3)
    weights = {key.removeprefix("model."): value for key, value in contents["state_dict"].items()}
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    adapted.load_state_dict(weights)
    moved = {key for key in weights if not torch.equal(weights[key], before[key])}
    assert any("lora_B" in key for key in moved) and "encoder.neck.0.weight" in moved
    images = torch.randn(2, 3, 64, 64)
    merged = load_segmenter(folder)
    assert type(merged.encoder) is SamEncoder and not any("lora" in key for key in merged.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(merged(images), adapted.eval()(images), rtol=1e-4, atol=1e-5)
    export(folder, "segment-anything", tmp_path / "sam.pth")
    exported = mae.load_sam(tmp_path / "sam.pth").state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in merged.encoder.state_dict().items())


def test_frozen_encoder_with_cached_tokens_trains_the_same_weights(tmp_path: Path, shapes_folder: Path) -> None:
    frozen = ("task.encoder=frozen", "data.flip=false", "max_steps=8", "val_every=null")
    plain = trained(tmp_path, shapes_folder, "name=plain", *frozen)
    kept = trained(tmp_path, shapes_folder, "name=kept", *frozen, f"task.embeddings={tmp_path / 'tokens'}")
    one, other = state(plain)["model"], state(kept)["model"]
    fresh = segmenter()[0].state_dict()
    assert all(torch.allclose(value, other[key], atol=1e-3) for key, value in one.items())
    assert (tmp_path / "tokens").is_dir() and len(list((tmp_path / "tokens").iterdir())) == 1
    still = {key for key, value in fresh.items() if torch.equal(one[f"model.{key}"], value)}
    frozen_part = {key for key in fresh if key.startswith("encoder.") and not key.startswith("encoder.neck.")}
    assert frozen_part <= still and "encoder.neck.0.weight" not in still
    with pytest.raises(ConfigError, match=r"set task.encoder=frozen and data.flip=false"):
        trained(tmp_path, shapes_folder, "name=no", f"task.embeddings={tmp_path}", "max_steps=1")


def test_cached_tokens_belong_to_one_encoder_and_one_data_set(tmp_path: Path) -> None:
    encoder = segmenter()[0].encoder
    tokens = encoder.tokens(torch.randn(1, 3, 64, 64))[0].detach()
    cache = TokenCache(tmp_path, encoder, 5, {"fingerprint": "a"})
    assert cache.read(4) is None
    kept = cache.keep(4, tokens)
    assert torch.equal(kept, tokens.bfloat16())
    again = TokenCache(tmp_path, encoder, 5, {"fingerprint": "a"})
    read = again.read(4)
    assert read is not None and torch.equal(read, kept) and again.read(0) is None
    assert TokenCache(tmp_path, encoder, 5, {"fingerprint": "b"}).folder != cache.folder
    with torch.no_grad():
        encoder.pos_embed.add_(1)
    assert TokenCache(tmp_path, encoder, 5, {"fingerprint": "a"}).folder != cache.folder


def test_damaged_tokens_are_computed_again_and_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    encoder = segmenter()[0].encoder
    cache = TokenCache(tmp_path / "tokens", encoder, 5, {})
    cache.keep(3, torch.ones(cache.shape))
    for damage in (lambda data: data[:-1], lambda data: bytes(8) + data[8:], lambda data: b""):
        whole = cache.path(3).read_bytes()
        cache.path(3).write_bytes(damage(whole))
        assert cache.read(3) is None
        cache.path(3).write_bytes(whole)
    assert cache.read(3) is not None
    cache.path(2).mkdir()
    assert cache.read(2) is None
    cache.path(2).rmdir()
    # A file may grow to 100 bytes: like a full disk.
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"task.embeddings=.* cannot be written .* 5 images take .* GB"):
            cache.keep(4, torch.ones(cache.shape))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not cache.path(4).exists() and [file.name for file in cache.path(4).parent.iterdir()] == ["000000003.tokens"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        TokenCache(tmp_path / "file", encoder, 5, {})


def test_blank_batch_leaves_no_tokens_in_the_cache(tmp_path: Path, shapes_folder: Path) -> None:
    """DDP settles its buckets by a backward pass on it before the first step."""
    settings = ("name=blank", "task.encoder=frozen", "data.flip=false", f"task.embeddings={tmp_path / 'tokens'}")
    task = Segment(compose(*words(tmp_path, shapes_folder, *settings)), Topology(rank=0, ranks=1, devices=1, nodes=1))
    module = task.module(task.model(None), task.recipe("32-true"))
    module.training_step(module.blank_batch(2), 0)["loss"].backward()
    assert not list((tmp_path / "tokens").rglob("*.tokens"))
    batch = next(iter(task.data.train_loader(lambda: 0)))
    module.training_step(batch, 0)
    kept = [int(file.stem) for file in (tmp_path / "tokens").rglob("*.tokens")]
    assert sorted(kept) == sorted(batch["samples"].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["all", "frozen", "kept", "lora"])
def test_segment_run_on_two_ranks_has_the_same_losses_under_ddp_and_fsdp(
    tmp_path: Path, shapes_folder: Path, encoder: str
) -> None:
    """With one validation image; the second half of each run is resumed from the other's checkpoint."""
    pixels, masks = shapes(1000)
    write_tar(tmp_path / "one" / "a-val-000000.tar", [(jpeg(pixels), record(masks))])
    settings = [f"data.val_path={tmp_path / 'one'}", "data.flip=false", "max_steps=8", "val_every=4", "task.ema=0.9"]
    settings += ["task.encoder=frozen" if encoder == "kept" else f"task.encoder={encoder}", "checkpoint.every_steps=4"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    ranks += ["experiment=digits_tiny"]
    for strategy in ("ddp", "fsdp"):
        own = [f"name={strategy}", f"trainer.strategy={strategy}"]
        own += [f"task.embeddings={tmp_path / strategy}-tokens"] * (encoder == "kept")
        run([*ranks, *words(tmp_path, shapes_folder, *settings, *own)])
    assert_close_losses(tmp_path / "ddp", tmp_path / "fsdp")
    if encoder == "kept":  # samples in which all is one value were black
        files = [file.read_bytes() for file in (tmp_path / "ddp-tokens").rglob("*.tokens")]
        assert len(files) == len(set(files)) == 24
    (tmp_path / "fsdp" / "checkpoints" / "step-00000008.ckpt").unlink()
    (tmp_path / "fsdp" / "summary.json").unlink()
    run([*ranks, *words(tmp_path, shapes_folder, "name=fsdp", "trainer.strategy=ddp", *settings)])
    assert_close_losses(tmp_path / "ddp", tmp_path / "fsdp")
    load_segmenter(tmp_path / "fsdp")


def assert_close_losses(one: Path, other: Path) -> None:
    expected, got = losses(one), losses(other)
    assert expected.keys() == got.keys() and {key[1] for key in expected} == {"train/loss", "train/lr", "val/loss"}
    for key, value in expected.items():
        assert float(got[key]) == pytest.approx(float(value), rel=1e-4), key


# What comes out.


def test_segment_run_exports_a_whole_sam_that_loads_back_from_both_formats(
    uninterrupted_run: Path, tmp_path: Path
) -> None:
    """Reads back what the exporter, which compares embeddings and masks itself, has written."""
    export(uninterrupted_run, "segment-anything", tmp_path / "sam.pth")
    export(uninterrupted_run, "hf-sam", tmp_path / "hf")
    own = load_segmenter(uninterrupted_run).state_dict()
    for path in (tmp_path / "sam.pth", tmp_path / "hf"):
        back = load_segmenter(path).state_dict()
        assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)
    with pytest.raises(CheckpointError, match="without a prompt encoder"):
        torch.save(load_segmenter(uninterrupted_run).encoder.state_dict(), tmp_path / "bare.pth")
        load_segmenter(tmp_path / "bare.pth")


def test_segment_scores_stand_beside_those_of_the_initial_weights(uninterrupted_run: Path, tmp_path: Path) -> None:
    probe = SegmentProbe(name="segment", clicks=[1, 2], pictures=2, images=3)
    scores = evaluate_segmentation(probe, uninterrupted_run, {"workers": 0}, 7, tmp_path)
    written = json.loads((tmp_path / "segment.json").read_text())
    assert scores["trained"]["objects"] == scores["untrained"]["objects"] == 6
    assert written["trained"]["box"] == scores["trained"]["box"] and set(written["untrained"]["clicks"]) == {"1", "2"}
    assert (tmp_path / "segment.png").is_file() and (tmp_path / "segment_pictures.png").is_file()
    settings = OmegaConf.to_container(OmegaConf.load(uninterrupted_run / "config.yaml"))
    start = before(load_segmenter(uninterrupted_run), settings, seed=7).state_dict()  # pyright: ignore[reportArgumentType]
    fresh = segmenter()[0].state_dict()  # of the run's seed, and not of the probe's
    assert all(torch.equal(value, fresh[key]) for key, value in start.items())


def test_segment_scores_survive_photographs_without_an_object(uninterrupted_run: Path, tmp_path: Path) -> None:
    """One of nothing but an empty mask, one of an empty mask and one that covers more than half."""
    pixels, (disc, _) = shapes(1)
    empty, most = np.zeros_like(disc), np.ones_like(disc)
    most[:20] = False
    file = tmp_path / "data" / "a-val-000000.tar"
    write_tar(file, [(jpeg(pixels), record(masks)) for masks in ([empty], [empty, most], [disc])])
    write_tar(tmp_path / "none" / "a-val-000000.tar", [(jpeg(pixels), record([empty]))] * 2)
    probe, given = SegmentProbe(name="segment", clicks=[1], pictures=3), {"workers": 0, "val_path": str(file.parent)}
    scores = evaluate_segmentation(probe, uninterrupted_run, given, 7, tmp_path / "out")
    assert scores["trained"]["objects"] == 2 and (tmp_path / "out" / "segment_pictures.png").is_file()
    with pytest.raises(ConfigError, match="found no object in 2 validation photographs"):
        evaluate_segmentation(probe, uninterrupted_run, given | {"val_path": str(tmp_path / "none")}, 7, tmp_path)
    found = examine(uninterrupted_run, tmp_path / "relevance", "probe.images=3", f"data.val_path={file.parent}")
    assert [photograph["sample"] for photograph in found["photographs"]] == [1, 2]


def test_unreadable_photographs_are_left_out_of_scores_and_relevance_and_named(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, found = shapes(1)
    photographs = [(jpeg(pixels), record(found)), (b"no picture", record(found)), (jpeg(pixels), b"no record")]
    file = write_tar(tmp_path / "data" / "a-val-000000.tar", photographs)
    probe, given = SegmentProbe(name="segment", clicks=[1], pictures=3), {"workers": 0, "val_path": str(file.parent)}
    scores = evaluate_segmentation(probe, uninterrupted_run, given, 7, tmp_path / "out")
    assert scores["trained"]["objects"] == 2
    keys = json.loads((tmp_path / "out" / "segment.json").read_text())["unreadable"]["test"]
    said = capsys.readouterr().out
    assert said.count(f"left out, because they cannot be read: 2 of 3 images of test: {keys[0]} (") == 1
    relevant = examine(uninterrupted_run, tmp_path / "relevance", "probe.images=3", f"data.val_path={file.parent}")
    assert len(relevant["photographs"]) == 1 and relevant["unreadable"]["test"] == keys and len(keys) == 2


# Relevance.


def examine(checkpoint: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """Returns what `eval.py probe=relevance` writes about two photographs."""
    words = [f"checkpoint={checkpoint}", "probe=relevance", "probe.images=2", "data.workers=0", f"out={out}"]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        launch(hydra.compose("eval", overrides=[*words, *overrides]))
    return json.loads((out / "relevance.json").read_text())


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, shapes_folder: Path) -> Path:
    """A run with relevance, as if its gate had been trained for long."""
    folder = trained(
        tmp_path_factory.mktemp("gated"), shapes_folder, "name=gated", "task.relevance=true", "max_steps=1"
    )
    file = newest_valid(folder)
    contents = read_own(file)
    torch.manual_seed(0)
    for name, value in contents["state_dict"].items():
        if name.startswith("model.relevance."):
            value.add_(torch.randn_like(value) * 0.1)
    write_checkpoint(contents, file)
    return folder


def test_relevance_probe_without_trained_gate_changes_nothing_and_says_so(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examine(uninterrupted_run, tmp_path)
    said = capsys.readouterr().out
    assert f"{uninterrupted_run} has no trained gate (train with task.relevance=true)" in said
    assert str(tmp_path / "relevance.json") in said
    assert found["identity"] and len(found["photographs"]) == 2
    for photograph in found["photographs"]:
        assert photograph["prompts"].keys() == {"click", "box"}
        for prompt in photograph["prompts"].values():
            assert prompt["gate"] == {"min": 0.5, "mean": 0.5, "max": 0.5}
            assert prompt["change"] == {"min": 0, "mean": 0, "max": 0}
    # A picture of 300 x 225 pixels for each map, four in a row for each prompt.
    with Image.open(tmp_path / "relevance.png") as picture:
        assert picture.size == (4 * 304, 22 + 4 * (225 + 22))
    names = [f"block-{block:02d}-{kind}.png" for block in (0, 1) for kind in ("mean", "rollout")]
    for photograph in found["photographs"]:
        files = sorted(Path(photograph["folder"]).iterdir())
        assert [file.name for file in files] == names
        for file in files:
            with Image.open(file) as picture:
                assert picture.size == (300, 225)
                assert np.ptp(np.asarray(picture, np.int16), axis=2).max() > 30  # colours over grey


def test_relevance_probe_shows_what_the_prompts_change(gated: Path, tmp_path: Path, capsys) -> None:
    found = examine(gated, tmp_path)
    assert not found["identity"] and "no trained gate" not in capsys.readouterr().out
    for photograph in found["photographs"]:
        for prompt in photograph["prompts"].values():
            assert 0 <= prompt["gate"]["min"] < prompt["gate"]["mean"] < prompt["gate"]["max"] <= 1
            assert 0 < prompt["change"]["mean"] < prompt["change"]["max"]
        click, box = photograph["prompts"]["click"], photograph["prompts"]["box"]
        ((x, y, label),) = click["points"]
        assert label == 1 and box["box"][0] <= x <= box["box"][2] and box["box"][1] <= y <= box["box"][3]
        assert click["gate"] != box["gate"]


def test_relevance_probe_takes_the_points_of_the_user(gated: Path, tmp_path: Path) -> None:
    found = examine(gated, tmp_path / "one", "probe.points=[[0.25,0.5],[0.75,0.5,0]]")
    other = examine(gated, tmp_path / "other", "probe.points=[[0.75,0.5]]")
    for photograph, changed in zip(found["photographs"], other["photographs"], strict=True):
        assert photograph["prompts"].keys() == {"points"}
        points = photograph["prompts"]["points"]["points"]  # of photographs of 120 x 90 pixels
        assert points == [pytest.approx([29.5, 44.5, 1], abs=1e-4), pytest.approx([89.5, 44.5, 0], abs=1e-4)]
        assert photograph["prompts"]["points"]["gate"] != changed["prompts"]["points"]["gate"]
    with Image.open(tmp_path / "one" / "relevance.png") as picture:
        assert picture.getpixel((75, 22 + 112)) == LABEL_COLOURS[1]
        assert picture.getpixel((225, 22 + 112)) == LABEL_COLOURS[0]


@pytest.mark.parametrize("point", ["[0.5]", "[0.5,1.5]", "[0.5,0.5,0.5]"])
def test_relevance_probe_refuses_invalid_points_before_it_loads_anything(point: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        examine(tmp_path / "nowhere", tmp_path, f"probe.points=[{point}]")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "is no point of a photograph: give [x, y] or [x, y, label]" in said


def test_relevance_probe_without_validation_photographs_raises_config_error(gated: Path, tmp_path: Path) -> None:
    shards_of_shapes(tmp_path / "train", val=0)
    (tmp_path / "train" / "shapes-val-000000.tar").unlink()
    with pytest.raises(ConfigError, match=r"probe=relevance needs validation photographs: set data\.val_path"):
        evaluate_relevance(RelevanceProbe(name="relevance"), gated, {"path": str(tmp_path / "train")}, tmp_path)
