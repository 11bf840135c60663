"""Derived numbers, schedule, parameter groups."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import mae
from mae.errors import CheckpointError, ConfigError
from mae.run.checkpoint_files import checkpoint_path
from mae.train.optim import OptimConfig, build_optimizer
from mae.train.schedule import Schedule, derive_schedule, rate_change, split_batch

PAPER = {"samples": 1_281_167, "global_batch": 4096, "micro_batch": 64, "ranks": 64, "epochs": 800, "max_steps": None}
RUN = Path("runs/none")


def test_schedule_of_the_papers_recipe_on_64_gpus_has_its_published_numbers() -> None:
    schedule = derive_schedule(OptimConfig(), **PAPER)
    assert (schedule.accumulate, schedule.steps_per_pass, schedule.total_steps) == (1, 312, 249_600)
    assert schedule.warmup_steps == 40 * 312
    assert schedule.peak_lr == pytest.approx(1.5e-4 * 16)


def test_longer_schedule_of_a_finished_run_names_both_rates() -> None:
    optim = OptimConfig(base_lr=4e-3, warmup_steps=0)
    six, twelve = (
        derive_schedule(optim, **PAPER | {"global_batch": 64, "ranks": 1, "max_steps": steps}) for steps in (6, 12)
    )
    assert (
        rate_change(twelve, asdict(six), RUN, 6)
        == "0.0005 at step 7, after 6.7e-05 at step 6: the schedule was made for 6 steps and is now for 12"
    )
    assert rate_change(six, asdict(six), RUN, 3) is None
    assert rate_change(twelve, asdict(six), RUN, 0) is None, "a fresh start"
    assert rate_change(twelve, {}, RUN, 6) is None, "a derived.json that is gone"


@pytest.mark.parametrize(("ranks", "micro_batch", "accumulate"), [(1, 64, 64), (8, 64, 8), (8, 512, 1), (8, None, 1)])
def test_accumulation_is_derived_from_batch_and_ranks(ranks, micro_batch, accumulate) -> None:
    schedule = derive_schedule(OptimConfig(), **PAPER | {"ranks": ranks, "micro_batch": micro_batch})
    assert schedule.accumulate == accumulate
    assert schedule.micro_batch * schedule.ranks * schedule.accumulate == 4096
    assert schedule.weight(schedule.micro_batch) == 1


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "unit", "split"),
    [
        (24, None, 1, (171, 1)),
        (24, 64, 1, (57, 3)),
        (1, 60, 1, (60, 69)),
        (24, None, 2, (172, 1)),
        (3, 1000, 4, (684, 2)),
        (4096, 1, 1, (1, 1)),
        (4095, 2, 1, (2, 1)),
    ],
)
def test_any_batch_is_split_over_any_ranks_in_whole_units(ranks, micro_batch, unit, split) -> None:
    assert split_batch(4096, micro_batch, ranks, unit) == split


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": 4097, "micro_batch": None}, "too few for 4097 ranks of micro_batch=null: one would"),
        ({"ranks": 4095, "micro_batch": 1}, "too few for 4095 ranks of micro_batch=1"),
        ({"micro_batch": 63, "unit": 2}, "micro_batch=63 have to be multiples of 2"),
        ({"global_batch": 4095, "micro_batch": None, "views": 2}, "global_batch=4095 and .* multiples of 2"),
        ({"samples": 4095}, "more than the 4095 training samples"),
        ({"epochs": 0.001}, "no whole step"),
    ],
)
def test_impossible_batch_or_length_raises_config_error_with_a_way_out(change, said) -> None:
    with pytest.raises(ConfigError, match=said):
        derive_schedule(OptimConfig(), **PAPER | change)


def test_max_steps_keeps_the_shape_of_the_schedule() -> None:
    schedule = derive_schedule(OptimConfig(), **PAPER | {"max_steps": 1000})
    assert (schedule.total_steps, schedule.warmup_steps) == (1000, 50)


def of(total_steps: int, **optim) -> Schedule:
    settings = OptimConfig.model_validate({"base_lr": 2.0, "min_lr": 0.2, "warmup_steps": 10} | optim)
    sizes = {"samples": 1024, "global_batch": 256, "micro_batch": None, "ranks": 1}
    return derive_schedule(settings, **sizes, epochs=5, max_steps=total_steps)


def test_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    at = [of(110).learning_rate(step) for step in (0, 5, 10, 60, 85, 110, 200)]
    fallen = 0.2 + (2.0 - 0.2) * 0.5 * (1 + math.cos(math.pi * 0.75))  # to the bit, as in earlier versions
    assert at == [0, 1.0, 2.0, pytest.approx(1.1), fallen, 0.2, 0.2]


def test_learning_rate_falls_linearly_after_the_warm_up() -> None:
    linear = of(110, schedule="linear")
    assert [linear.learning_rate(step) for step in (5, 10, 60, 110)] == [1.0, 2.0, pytest.approx(1.1), 0.2]


def test_learning_rate_of_wsd_is_constant_and_cools_down_in_the_last_share() -> None:
    wsd = of(100, schedule="wsd", cooldown=0.25)
    assert (wsd.cooldown_start, wsd.cooldown_steps) == (75, 25)
    assert [wsd.learning_rate(step) for step in (5, 10, 74, 75)] == [1.0, 2.0, 2.0, 2.0]
    assert wsd.learning_rate(91) == pytest.approx(0.2 + 1.8 * (1 - 0.8))
    assert wsd.learning_rate(100) == 0.2


@pytest.mark.parametrize("warmup", [{"warmup_steps": 10}, {"warmup_steps": None, "warmup_epochs": 2.5}])
def test_wsd_of_any_length_has_the_same_rates_up_to_its_cool_down(warmup) -> None:
    short, long = (of(steps, schedule="wsd", **warmup) for steps in (100, 1000))
    assert short.warmup_steps == 10
    assert [short.learning_rate(step) for step in range(81)] == [long.learning_rate(step) for step in range(81)]
    with pytest.raises(ConfigError, match="10 steps of warm-up and 2 of cool-down do not fit into 11"):
        of(11, schedule="wsd", **warmup)


def test_schedule_is_steps_where_milestones_are_given_and_refuses_what_is_of_another_one() -> None:
    for settings, named in (({}, "cosine"), ({"milestones": [0.5]}, "steps"), ({"schedule": None}, "cosine")):
        assert OptimConfig.model_validate(settings).schedule == named
    for settings, said in (
        ({"schedule": "wsd", "milestones": [0.5]}, "are for schedule=steps, and this is schedule=wsd"),
        ({"schedule": "steps"}, r"needs optim\.milestones"),
        ({"cooldown": 0.1}, r"cooldown=0\.1 is for schedule=wsd, and this is schedule=cosine"),
    ):
        with pytest.raises(ValueError, match=said):
            OptimConfig.model_validate(settings)


def test_longer_wsd_run_says_what_becomes_of_the_rate(tmp_path: Path) -> None:
    short, long = of(100, schedule="wsd"), of(200, schedule="wsd")
    constant = "as in a run of this length from the beginning: the cool-down begins after step 160"
    assert rate_change(long, asdict(short), tmp_path, 80) == constant
    cooled = rate_change(long, asdict(short), tmp_path, 100) or ""
    assert cooled.startswith("2 at step 101, after 0.246 at step 100: the schedule was made for 100 steps and is now")
    assert cooled.endswith("The cool-down that began after step 80 stays in the weights")
    before = checkpoint_path(tmp_path, 80)
    before.parent.mkdir()
    before.touch()
    assert (rate_change(long, asdict(short), tmp_path, 90) or "").endswith(
        f"; resume={before} with another name= carries on from before it"
    )


def test_adamw_decays_matrices_only_with_each_parameter_in_one_group() -> None:
    model = mae.MaskedAutoencoder(
        mae.MAEConfig(image_size=32, patch_size=8, width=32, depth=1, num_heads=2, decoder_width=32, decoder_depth=1)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, rest = build_optimizer(model.named_parameters(), OptimConfig(), 1e-3).param_groups
    assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    decayed, undecayed = ({names[id(p)] for p in group["params"]} for group in (decay, rest))
    assert decayed | undecayed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not decayed & undecayed
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert decayed == linears
    assert {"cls_token", "mask_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= undecayed


def test_optimiser_state_is_loaded_by_parameter_names() -> None:
    """It is the same for parameters in another order, and refused for others."""
    torch.manual_seed(0)
    parameters = [(name, nn.Parameter(torch.randn(3, 2))) for name in ("a.weight", "b.weight", "c.bias")]
    optimizer = build_optimizer(parameters, OptimConfig(), 1e-3)
    for number, (_, parameter) in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 1)
    optimizer.step()
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [["a.weight", "b.weight"], ["c.bias"]]
    other = build_optimizer(parameters[::-1], OptimConfig(), 1e-3)
    other.load_state_dict(state)
    for name, parameter in parameters:
        assert torch.equal(other.state[parameter]["exp_avg"], state["state"][name]["exp_avg"])
    with pytest.raises(CheckpointError, match=r"other parameters: b\.weight differ"):
        build_optimizer([parameters[0], parameters[2]], OptimConfig(), 1e-3).load_state_dict(state)
