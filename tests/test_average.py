"""The moving average of the weights: that of torch, unmoved by skipped steps, resumed, read and exported by name."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import mae
from mae.distributed.launch import Topology
from mae.errors import ConfigError
from mae.export.write import export
from mae.formats.opened import open_weights
from mae.formats.warm_start import initialise_from
from mae.models.mae import MaskedAutoencoder
from mae.models.vit import Encoder
from mae.report.evaluations import read_evaluations
from mae.run.checkpoint_files import newest_valid, read_own
from mae.run.metrics import read_metrics
from mae.train.average import pair_parameters, update_average
from tasks.evaluate import evaluate
from tasks.pretrain import Pretrain
from tasks.train import match_recipe, train
from tests.poisoned_run import Poison
from tests.processes import SMALL, assert_same_run
from tests.test_eval import settings
from tests.test_experiments import compose
from tests.test_ranks import forget

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
STEPS = ("max_steps=8", "data.workers=0", "precision=32-true", "checkpoint.every_steps=4", "val_every=null")
AVERAGE = ("task.ema=0.6", "micro_batch=32", "online_probe.every=8", "online_probe.test_images=50")
DECAYS = [min(0.6, (1 + step) / (10 + step)) for step in range(8)]


class Follow(pl.Callback):
    """Has torch average the encoder's weights after every step but the skipped ones."""

    def __init__(self, skipped: set[int]) -> None:
        self.skipped = skipped
        self.decay = 0.0
        self.seen: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer, module) -> None:
        encoder = Encoder(module.model.config)
        encoder.load_state_dict(self.encoder_of(module))
        self.peer = AveragedModel(encoder, avg_fn=lambda average, new, _: new.lerp(average, self.decay))
        self.peer.update_parameters(encoder)  # the first time it copies

    def encoder_of(self, module: pl.LightningModule) -> dict[str, Tensor]:
        names = Encoder(module.model.config).state_dict()
        return {name: value for name, value in module.model.state_dict().items() if name in names}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step - 1
        encoder = Encoder(module.model.config)
        encoder.load_state_dict(self.encoder_of(module))
        self.decay = DECAYS[step]
        if step not in self.skipped:
            self.peer.update_parameters(encoder)
        self.seen.append({name: value.clone() for name, value in module.average.state_dict().items()})


def pretrain(runs: Path, root: Path, name: str, *words: str, bad: set[int]) -> tuple[Path, Follow | None]:
    torch.set_num_threads(1)
    config = compose(*SMALL, *STEPS, f"runs={runs}", f"data.root={root}", f"name={name}", *words)
    follow = Follow(bad) if config.task.ema else None
    train(config, ALONE, [Poison(bad), *([follow] if follow else [])])
    return config.run, follow


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> tuple[Path, Follow]:
    """Eight steps of two micro-batches, of which the fourth and fifth are skipped."""
    run, follow = pretrain(tmp_path_factory.mktemp("averaged"), built_in, "run", *AVERAGE, bad={3, 4})
    assert follow is not None
    return run, follow


def average_in(run: Path) -> dict[str, Tensor]:
    state = read_own(newest_valid(run) or Path())["state_dict"]
    return {name.removeprefix("average."): value for name, value in state.items() if name.startswith("average.")}


def test_average_equals_that_of_torch_and_stays_at_skipped_steps(averaged: tuple[Path, Follow]) -> None:
    run, follow = averaged
    found, model = average_in(run), read_own(newest_valid(run) or Path())["state_dict"]
    assert found.keys() == follow.peer.module.state_dict().keys()
    for name, value in follow.peer.module.state_dict().items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-6), name
    weight = [seen["blocks.0.mlp.fc1.weight"] for seen in follow.seen]
    same = [step for step in range(1, 8) if torch.equal(weight[step], weight[step - 1])]
    assert same == [3, 4] and not torch.equal(weight[-1], model["model.blocks.0.mlp.fc1.weight"])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_average_on_a_gpu_stays_at_a_skipped_step_and_else_moves_as_on_the_host() -> None:
    torch.manual_seed(0)
    model, average = nn.Linear(300, 400), nn.Linear(300, 400).requires_grad_(False)
    on_gpu, of_gpu = deepcopy(model).cuda(), deepcopy(average).cuda()
    pairs = pair_parameters(of_gpu, on_gpu)
    update_average(pairs, 0.9, 100, torch.ones((), device="cuda"))
    assert torch.equal(of_gpu.weight.cpu(), average.weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_average(pairs, 0.9, 100, torch.zeros((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    update_average(pair_parameters(average, model), 0.9, 100)
    assert torch.allclose(of_gpu.weight.cpu(), average.weight, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_run_with_an_average_trains_the_same_weights_as_the_run_without(
    averaged: tuple[Path, Follow], built_in: Path, tmp_path: Path
) -> None:
    plain, _ = pretrain(tmp_path, built_in, "plain", "micro_batch=32", bad={3, 4})
    with_average, without = (read_own(newest_valid(run) or Path()) for run in (averaged[0], plain))
    for name, value in without["state_dict"].items():
        assert torch.equal(with_average["state_dict"][name], value), name


def test_run_resumed_with_its_average_equals_the_uninterrupted_one(
    averaged: tuple[Path, Follow], built_in: Path, tmp_path: Path
) -> None:
    shutil.copytree(averaged[0], tmp_path / "run")
    forget(tmp_path / "run", after=4)
    pretrain(tmp_path, built_in, "run", *AVERAGE, bad={3, 4})
    assert_same_run(tmp_path / "run", averaged[0])


def test_resuming_with_the_average_switched_on_or_off_is_refused(
    averaged: tuple[Path, Follow], built_in: Path, tmp_path: Path
) -> None:
    config = compose(*SMALL, *STEPS, f"runs={tmp_path}", f"data.root={built_in}", "name=off")
    with pytest.raises(ConfigError, match=r"belongs to a different run: task.ema \(0.6 in the checkpoint, None now\)"):
        match_recipe(Pretrain(config, ALONE), newest_valid(averaged[0]))


def test_average_is_loaded_by_its_word_and_the_raw_weights_without_it(averaged: tuple[Path, Follow], capsys) -> None:
    run, _ = averaged
    raw, average = mae.load(run), mae.load(run, weights="average")
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("the raw weights; weights=average takes their average") == 1
    assert isinstance(raw, MaskedAutoencoder) and type(average) is Encoder
    for name, value in average_in(run).items():
        assert torch.equal(average.state_dict()[name], value), name
    model = read_own(newest_valid(run) or Path())["state_dict"]
    assert all(torch.equal(value, model[f"model.{name}"]) for name, value in raw.state_dict().items())
    opened = open_weights(run, weights="average")
    with pytest.raises(ConfigError, match="is open already"):
        mae.load(opened, weights="raw")
    fresh = MaskedAutoencoder(raw.config)
    assert "there is no decoder in it: the decoder starts from random weights" in initialise_from(
        fresh, run, weights="average"
    )
    assert torch.equal(fresh.norm.weight, average.norm.weight)


def test_average_that_is_not_there_is_one_sentence(averaged: tuple[Path, Follow], tmp_path: Path) -> None:
    checkpoint = read_own(newest_valid(averaged[0]) or Path())
    checkpoint["state_dict"] = {
        name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("average.")
    }
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    assert open_weights(tmp_path / "plain.ckpt", weights="raw").taken is None
    with pytest.raises(ConfigError, match=r"plain.ckpt holds no average of the weights: its run had no task.ema"):
        mae.load(tmp_path / "plain.ckpt", weights="average")
    with pytest.raises(ValueError, match=r"init_weights=average says which weights of init_from=, which is not set"):
        compose(*SMALL, "init_weights=average")


def test_export_of_the_average_holds_it_and_says_so(averaged: tuple[Path, Follow], tmp_path: Path) -> None:
    run, _ = averaged
    card = export(run, "timm", tmp_path / "encoder.safetensors", weights="average")
    assert json.loads(card.read_text())["weights"] == "average"
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["weights"]) == "average"
        assert all(torch.equal(file.get_tensor(name), value) for name, value in average_in(run).items())
    with pytest.raises(ConfigError, match="weights=average is for checkpoints of a run"):
        mae.load(tmp_path / "encoder.safetensors", weights="average")
    assert json.loads(export(run, "facebook", tmp_path / "raw.pth").read_text())["weights"] == "raw"
    with pytest.raises(ConfigError, match=r"the average in .* is one of the encoder alone \(--weights raw"):
        export(run, "hf-vitmae", tmp_path / "whole", weights="average")


def test_probe_of_the_average_lies_beside_that_of_the_raw_weights(averaged: tuple[Path, Follow]) -> None:
    run, _ = averaged
    (row,) = [row for row in read_metrics(run / "metrics.csv") if "rank/rankme" in row]
    assert 0 < float(row["knn_average/top1"]) <= 1 < float(row["rank_average/rankme"]) != float(row["rank/rankme"])
    for word in ("raw", "average"):
        evaluate(settings(run, "probe=knn", "probe.train_images=100", "cache_gb=0", f"weights={word}"), ALONE)
    results = [json.loads((run / "eval" / place / "knn.json").read_text()) for place in ("", "average")]
    assert [result["weights"] for result in results] == ["raw", "average"]
    assert results[0]["untrained"] == results[1]["untrained"]
    found, left_out = read_evaluations(run / "eval")
    assert [evaluation.name for evaluation in found] == ["knn", "knn of the average weights"] and not left_out
