"""A plan counts what a step really multiplies and holds, and is printed without starting anything."""

import json
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mae
from mae.errors import ConfigError
from mae.models.attention import set_attention
from mae.models.execution import BlocksConfig
from mae.models.flops import pretraining_flops
from mae.plan.devices import Hardware, known_device, recognise
from mae.plan.dry_step import Tally, Workload, autocast, dry_step
from mae.plan.executed_flops import executed_pretraining_flops
from mae.plan.forecast import MEMORY_RESERVE, Forecast, Layout, layout
from mae.plan.tables import duration
from mae.plan.training_cost import (
    pretraining,
    pretraining_cost,
    sam_training,
    segmentation,
    segmentation_cost,
)
from mae.sam.config import SegmentConfig, build_segmenter
from mae.sam.encoder import SIZES, SamConfig
from mae.sam.flops import executed_sam_flops, sam_flops
from mae.train.optim import OptimConfig, build_optimizer
from tests.processes import SMALL, completed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BASE = mae.MAEConfig()
MIDDLE = mae.MAEConfig(depth=4)
LARGE = mae.MAEConfig(width=1024, depth=24, num_heads=16)
HUGE = mae.MAEConfig(width=1280, depth=32, num_heads=16, patch_size=14)
TINY = mae.MAEConfig(image_size=(32, 32), patch_size=4, width=64, depth=2, num_heads=2, decoder_depth=2)
SMALL_SAM = SamConfig(image_size=(512, 512), depth=4, global_blocks=(1, 3))
NARROW = mae.MAEConfig(image_size=(128, 128), width=96, depth=2, num_heads=3)
# Dry steps of large models take seconds.
training_cost = cache(pretraining_cost)
H100 = Hardware("h100", "cuda", 989e12, 80 * 2**30, measured=False, link=math.inf)


@pytest.mark.parametrize(("config", "giga"), [(LARGE, 123.8), (HUGE, 290.5)])
def test_pretraining_flops_equal_the_published_count(config: mae.MAEConfig, giga: float) -> None:
    assert pretraining_flops(config) / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize(
    ("config", "device"),
    [
        (MIDDLE, CPU),
        (MIDDLE, CUDA),
        pytest.param(BASE, CPU, marks=pytest.mark.slow),
        pytest.param(HUGE, CUDA, marks=pytest.mark.slow),
        (TINY, CPU),
    ],
    ids=["middle", "fused", "base", "huge14", "tiny"],
)
def test_pretraining_flops_formula_agrees_with_the_dry_step(config: mae.MAEConfig, device: torch.device) -> None:
    step = training_cost(config, "bf16-mixed", device).kept
    assert step.flops == pytest.approx(executed_pretraining_flops(config), rel=0.02)
    if config in (BASE, HUGE):  # what the paper's algorithm computes beyond it is much only for a decoder of few blocks
        assert step.flops == pytest.approx(pretraining_flops(config), rel=0.02)


@pytest.mark.parametrize("fused", [False, True])
def test_dry_step_flops_equal_those_of_torchs_counter(fused: bool) -> None:
    model = mae.MaskedAutoencoder(TINY)
    set_attention(model, fused=fused or None)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 32, 32), torch.rand(4, 64)).loss.backward()
    kept = training_cost(TINY, "32-true", CUDA if fused else CPU).kept
    assert kept.flops == counter.get_total_flops() / 4


def test_sam_flops_formula_agrees_with_the_dry_step() -> None:
    step = dry_step(sam_training(SMALL_SAM), 1, "bf16-mixed", recompute=False)
    assert step.flops == pytest.approx(executed_sam_flops(SMALL_SAM), rel=0.02)


def sessions(**fields: Any) -> SegmentConfig:
    """Settings of task=segment for NARROW."""
    small = {"name": "segment", "image_size": 128, "global_blocks": (1,), "masks_per_image": 4, "clicks": 2}
    return SegmentConfig.model_validate(small | fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"clicks": 0, "mask_input": False, "multimask": False},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in ({}, {"encoder": "frozen"}, {"decoder": "frozen"})
        ),
    ],
)
def test_flops_formula_of_sessions_agrees_with_the_dry_step(fields: dict[str, Any]) -> None:
    cost = segmentation_cost(NARROW, sessions(**fields), "bf16-mixed")
    assert cost.kept.flops == pytest.approx(cost.executed, rel=0.02)


@pytest.mark.slow
def test_sam_flops_formula_agrees_with_the_dry_step_at_1024() -> None:
    step = dry_step(sam_training(SIZES["sam_base"]), 1, "bf16-mixed", recompute=False)
    assert step.flops == pytest.approx(executed_sam_flops(SIZES["sam_base"]), rel=0.02)


def test_sam_huge_encoder_takes_3_tera_multiply_adds_as_in_segment_anything() -> None:
    image_encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
    with torch.device("meta"), torch.no_grad():
        theirs = image_encoder.ImageEncoderViT(
            embed_dim=1280,
            depth=32,
            num_heads=16,
            use_rel_pos=True,
            window_size=14,
            global_attn_indexes=(7, 15, 23, 31),
        )
        with FlopCounterMode(display=False) as counter:
            theirs(torch.empty(1, 3, 1024, 1024))
    assert counter.get_total_flops() == pytest.approx(sam_flops(SIZES["sam_huge"], pad=True), rel=0.02)
    assert sam_flops(SIZES["sam_huge"], pad=True) / 2 == pytest.approx(2.98e12, rel=0.001)


@pytest.mark.parametrize("config", [MIDDLE, TINY], ids=["middle", "tiny"])
def test_planned_bytes_of_weights_gradients_and_moments_are_exact(config: mae.MAEConfig) -> None:
    cost = training_cost(config, "bf16-mixed", CPU)
    model = mae.MaskedAutoencoder(config)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.kept.weights == 4 * sum(p.numel() for p in model.parameters()) == 4 * sum(cost.parameters.values())
    assert cost.kept.gradients == 4 * learning
    assert cost.kept.optimiser == pytest.approx(8 * learning, abs=4 * len(list(model.parameters())))  # and a step each
    encoder = mae.Encoder(config)
    assert cost.parameters["encoder"] == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "workload",
    [
        pretraining(TINY, CPU),
        sam_training(SamConfig(image_size=(96, 96), width=48, depth=4, global_blocks=(3,))),
        segmentation(NARROW, sessions(clicks=0, mask_input=False)),
        pytest.param(segmentation(NARROW, sessions(encoder="frozen", masks_at_a_time=5)), marks=pytest.mark.slow),
    ],
)
def test_dry_step_counts_the_bytes_and_flops_of_a_real_step(
    workload: Workload, precision: str, recompute: bool
) -> None:
    dry = dry_step(workload, 3, precision, recompute=recompute)
    model = workload.build(recompute)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(), lr=1e-3)
    workload.loss(model, 1).backward()
    optimizer.step()
    existing = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Tally(existing) as tally:
        with autocast(precision):
            loss = workload.loss(model, 3)
        loss.backward()
    assert dry.copies + dry.activations == pytest.approx(tally.highest, rel=0.01)
    assert dry.copies == tally.casts
    assert dry.flops == tally.flops


def test_activations_grow_with_the_batch_and_shrink_under_checkpointing() -> None:
    workload = pretraining(MIDDLE, CUDA)
    one = training_cost(MIDDLE, "bf16-mixed", CUDA)
    sixteen = dry_step(workload, 16, "bf16-mixed", recompute=False)
    assert one.kept.at(16).activations == pytest.approx(sixteen.activations, rel=0.01)
    assert one.recomputed.activations < one.kept.activations / 2
    assert one.kept.flops < one.recomputed.flops < one.kept.flops * 4 / 3


@pytest.mark.slow
def test_sessions_cost_memory_by_masks_and_answers_unless_a_few_are_held_at_a_time() -> None:
    def activations(**fields: Any) -> int:
        return dry_step(segmentation(NARROW, sessions(**fields)), 1, "32-true", recompute=False).activations

    one, many = activations(masks_per_image=4), activations(masks_per_image=16)
    assert activations(masks_per_image=4, clicks=8) > 1.8 * one
    assert many > 3 * one
    assert activations(masks_per_image=16, masks_at_a_time=4) < 1.2 * one


def test_plan_counts_the_average_of_the_encoder_in_memory_and_checkpoint() -> None:
    plain, averaged = (pretraining_cost(TINY, "32-true", CPU, averaged=averaged) for averaged in (False, True))
    size = sum(p.nbytes for p in mae.Encoder(TINY).parameters())
    assert (plain.average, averaged.average) == (0, size)
    assert averaged.checkpoint_bytes == plain.checkpoint_bytes + size


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strategy", ["one device", "DDP", "FSDP"])
def test_largest_micro_batch_is_the_last_that_fits(strategy: str, recompute: bool) -> None:
    cost = training_cost(MIDDLE, "bf16-mixed", CUDA)

    def at(micro_batch: int):
        return layout(strategy, recompute, cost, H100, ranks=8, micro_batch=micro_batch, global_batch=64, mfu=0.4)

    largest = at(1).largest_micro_batch
    assert at(largest).total <= H100.memory * (1 - MEMORY_RESERVE) < at(largest + 1).total
    if strategy == "FSDP":
        assert at(1).optimiser == cost.kept.optimiser // 8
        averaged = layout(
            strategy, recompute, cost._replace(average=800), H100, ranks=8, micro_batch=1, global_batch=64, mfu=0.4
        )
        assert averaged.average == 100 and averaged.total == at(1).total + 100
    small = Hardware("small", "cuda", 1e12, 2**30, measured=False)
    assert (
        layout("DDP", recompute, cost, small, ranks=8, micro_batch=1, global_batch=64, mfu=0.4).largest_micro_batch == 0
    )


def test_planned_speed_is_the_peak_times_the_utilisation_over_the_flops() -> None:
    cost = training_cost(MIDDLE, "bf16-mixed", CUDA)
    kept = layout("DDP", False, cost, H100, ranks=64, micro_batch=64, global_batch=64, mfu=0.5)
    assert kept.images_per_s == pytest.approx(64 * 989e12 * 0.5 / pretraining_flops(MIDDLE))
    recomputed = layout("DDP", True, cost, H100, ranks=64, micro_batch=64, global_batch=64, mfu=0.5)
    assert 0.75 < recomputed.images_per_s / kept.images_per_s < 1


def test_planned_waiting_is_what_the_network_takes_longer_than_the_computation() -> None:
    cost = training_cost(MIDDLE, "bf16-mixed", CUDA)
    size, card = cost.kept.gradients, H100._replace(link=1e9)

    def at(
        strategy: str, micro_batch: int, ranks: int = 8, network: float = math.inf, hardware: Hardware = card
    ) -> Layout:
        sizes = {"ranks": ranks, "micro_batch": micro_batch, "global_batch": 1024, "mfu": 0.5, "network": network}
        return layout(strategy, False, cost, hardware, **sizes)

    computing = 1024 / at("DDP", 128, hardware=H100).images_per_s
    assert 1024 / at("DDP", 128).images_per_s == pytest.approx(computing / 3 + 2 * 7 / 8 * size / 1e9)
    # DDP sums once a step, beside the last pass alone; FSDP gathers in every pass.
    assert at("DDP", 16).images_per_s == pytest.approx(1024 / (computing * (1 - 2 / 3 / 8) + 2 * 7 / 8 * size / 1e9))
    one_pass = 7 / 8 * (2 * cost.kept.weights + size) / 1e9
    assert 1024 / at("FSDP", 16).images_per_s == pytest.approx(8 * one_pass)
    assert 1024 / at("FSDP", 128).images_per_s == pytest.approx(one_pass)
    assert at("FSDP", 16).waiting == pytest.approx(1 - computing / (8 * one_pass))
    # Between nodes: eight rings, one over each device's network.
    slow = at("DDP", 16, ranks=16, network=1e7)
    assert slow.waiting > at("DDP", 16, ranks=16).waiting
    assert 1024 / slow.images_per_s == pytest.approx(2 * 15 / 16 * size / 8e7, rel=0.01)
    assert at("DDP", 128, ranks=1).waiting == 0


def forecast(ranks: int, memory_gib: float, link: float = 450e9, **changed: Any) -> Forecast:
    numbers: dict[str, Any] = {"global_batch": 1024, "micro_batch": 1024 // ranks, "accumulate": 1, "mfu": 0.4}
    unknown = ("images", "samples", "sampling", "shards", "shard_bytes", "loading", "price", "saving")
    card = H100._replace(memory=int(memory_gib * 2**30), link=link)
    return Forecast(
        training_cost(MIDDLE, "bf16-mixed", CUDA),
        card,
        ranks=ranks,
        precision="bf16-mixed",
        checkpoints=3,
        network=25e9,
        **dict.fromkeys(unknown),
        **(numbers | changed),
    )


def test_plan_recommends_the_simplest_of_the_fastest_layouts_that_fit() -> None:
    large = forecast(8, 80).recommended
    assert large is not None and (large.strategy, large.recompute, large.micro_batch) == ("DDP", False, 128)
    cost = forecast(8, 80).cost
    held = cost.kept.weights + cost.kept.gradients + cost.kept.optimiser + cost.kept.copies
    room = (held + 40 * cost.kept.activations) / (1 - MEMORY_RESERVE) / 2**30
    tight = forecast(8, room).recommended
    assert tight is not None and (tight.strategy, tight.recompute, tight.micro_batch) == ("DDP", False, 32)
    small = forecast(8, held * 0.8 / (1 - MEMORY_RESERVE) / 2**30).recommended
    assert small is not None and small.strategy == "FSDP"
    assert forecast(8, 1e-3).recommended is None
    alone = forecast(1, 80).recommended
    assert alone is not None and alone.strategy == "one device"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080-ti"),
        ("Tesla P100-PCIE-16GB", "p100"),
    ],
)
def test_device_names_of_drivers_are_recognised(said: str, name: str) -> None:
    assert recognise(said) == known_device(name)


def test_unknown_device_is_none_or_raises_config_error() -> None:
    assert recognise("NVIDIA GeForce GTX 1080") is None and recognise("Quadro RTX 6000") is None
    with pytest.raises(ConfigError, match=r"plan\.gpu=h1000 is not in the table of devices: choose one of"):
        known_device("h1000")


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (0.005, "18 s"),
        (0.2, "12 min"),
        (7.66, "7 h 40 min"),
        (47.9, "47 h 54 min"),
        (292, "12 d 4 h"),
        (1.0, "1 h 0 min"),
    ],
)
def test_length_of_a_plan_is_said_in_two_units(hours: float, said: str) -> None:
    assert duration(hours) == said


def words_of(tables: str) -> str:
    return " ".join(re.sub("[│┃]", " ", tables).split())


def program(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    runs = [f"runs={tmp_path / 'runs'}", f"plan.json={tmp_path / 'plan.json'}"]
    return completed([sys.executable, "train.py", "plan=true", *runs, *words])


@pytest.mark.parametrize(
    ("experiment", "parameters", "giga", "accumulate"),
    [
        ("imagenet_base", "111,907,840", 58.167, 1),
        pytest.param("imagenet_huge14", "657,074,508", 290.5, 1, marks=pytest.mark.slow),
    ],
)
def test_plan_of_64_gpus_needs_no_data(
    tmp_path: Path, experiment: str, parameters: str, giga: float, accumulate: int
) -> None:
    done = program(
        tmp_path, f"experiment={experiment}", "plan.gpus=64", "plan.gpu=h100", "plan.samples=1281167", "plan.price=2.5"
    )
    assert done.returncode == 0, done.stderr
    assert parameters in done.stdout and f"{giga} G by formula" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["ranks"] == 64 and plan["accumulate"] == accumulate and plan["precision"] == "bf16-mixed"
    assert plan["images"] == 249_600 * 4096
    assert [(x["strategy"], x["recompute"]) for x in plan["layouts"]] == [
        (strategy, recompute) for strategy in ("DDP", "FSDP") for recompute in (False, True)
    ]
    hours = 249_600 * 4096 * giga * 1e9 / (64 * 989e12 * 0.4) / 3600
    fastest = plan["layouts"][0]
    assert (fastest["hours"], fastest["days"]) == pytest.approx((hours, hours / 24), rel=2e-3)
    assert fastest["price"] == pytest.approx(2.5 * fastest["device_hours"]) == pytest.approx(160 * hours, rel=2e-3)
    assert fastest["node_images_per_s"] == pytest.approx(8 * 989e12 * 0.4 / (giga * 1e9), rel=2e-3)
    said = words_of(done.stdout)
    assert "GPU-hours" in said and duration(hours) in said and "each node of 8 devices needs" in said
    assert not (tmp_path / "runs").exists()


def test_plan_without_data_leaves_out_the_length_and_names_plan_samples(tmp_path: Path) -> None:
    done = program(tmp_path, "experiment=imagenet_base", "plan.gpu=v100-32", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "plan.samples" in done.stdout and "GPU-hours" not in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["images"] is None and plan["precision"] == "32-true"


def test_plan_counts_the_samples_of_available_data(tmp_path: Path, built_in: Path) -> None:
    done = program(tmp_path, f"data.root={built_in}", "epochs=2", *SMALL)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["images"] == 2 * (1438 // 64) * 64
    assert plan["stored"]["shards"] == 3 and plan["hardware"]["measured"]
    assert plan["loading"] > 50 and "the loader does" in words_of(done.stdout)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_segment_plan_counts_encoder_and_sessions_at_1024(tmp_path: Path) -> None:
    small = ["model.width=64", "model.num_heads=2", "model.depth=4"]
    done = program(tmp_path, "task=segment", "plan.gpu=a100-80", "plan.samples=1000", "global_batch=8", *small)
    assert done.returncode == 0, done.stderr
    assert "180 GFLOPs" in done.stdout and "2.98 T multiply-adds" in " ".join(done.stdout.split())
    plan = json.loads((tmp_path / "plan.json").read_text())
    with torch.device("meta"):
        config = mae.MAEConfig(width=64, num_heads=2, depth=4)
        model = build_segmenter(config, SegmentConfig(name="segment"), BlocksConfig())
    assert sum(plan["work"]["parameters"].values()) == sum(p.numel() for p in model.parameters())
    said = words_of(done.stdout)
    assert "task.masks_per_image=64 objects" in said and "each answered 11 times" in said
    assert plan["layouts"][0]["activations"] > 64 * 11 * 4 * 256 * 64 * 64  # the embedding, of each object and answer
