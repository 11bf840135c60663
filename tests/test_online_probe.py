"""Probing during a run measures what the encoder has learned and changes nothing of the run."""

from pathlib import Path

import pytest
import torch

import mae
from data.datamodule import DataConfig, ShardDataModule
from data.evaluation import EvaluationImages
from mae.distributed.launch import Topology
from mae.models.pixels import Pixels
from mae.probes.features import Features, describe, rankme
from mae.probes.knn import knn_accuracy
from mae.run.metrics import read_metrics
from tasks.train import train
from tests.processes import SMALL, assert_same_run, command, run
from tests.test_experiments import compose

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
STEPS = ("max_steps=6", "precision=32-true", "checkpoint.every_steps=3", "checkpoint.keep=5")
PROBE = ("online_probe.every=2", "online_probe.train_images=200", "online_probe.test_images=100")


def trained(runs: Path, root: Path, name: str, *overrides: str) -> Path:
    config = compose(f"runs={runs}", f"data.root={root}", *SMALL, *STEPS, f"name={name}", *overrides)
    torch.set_num_threads(1)  # the number of threads decides the order of summation
    train(config, ALONE)
    return config.run


def probed(folder: Path) -> dict[int, dict[str, float]]:
    rows = [row for row in read_metrics(folder / "metrics.csv") if "rank/rankme" in row]
    return {int(row["step"]): {name: float(value) for name, value in row.items()} for row in rows}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    return trained(tmp_path_factory.mktemp("plain"), built_in, "plain", "data.workers=0")


@pytest.fixture(scope="module")
def with_probe(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    return trained(tmp_path_factory.mktemp("probed"), built_in, "probed", "data.workers=0", *PROBE)


def test_run_with_online_probe_equals_the_run_without(
    plain: Path, with_probe: Path, built_in: Path, tmp_path: Path
) -> None:
    """Bit for bit, whichever process reads the images that are probed."""
    assert list(probed(with_probe)) == [2, 4, 6]
    for folder in (with_probe, trained(tmp_path, built_in, "workers", "data.workers=2", *PROBE)):
        assert_same_run(folder, plain)


def test_logged_probe_scores_equal_those_of_the_checkpoint_of_that_step(with_probe: Path, built_in: Path) -> None:
    model = mae.load(with_probe / "checkpoints" / "step-00000006.ckpt")
    config = DataConfig(source="digits", root=str(built_in), workers=0, mean=(0.3,) * 3, std=(0.34,) * 3)
    data = ShardDataModule(config, image_size=(32, 32), channels=3, seed=0, global_batch=1, micro_batch=1)
    images, pixels = EvaluationImages(data, 64), Pixels(config.mean, config.std)

    def features(split: str, count: int) -> Features:
        samples = images.samples(split, count)
        with torch.no_grad():
            latent = model.encode(pixels.normalise(images.crops(split, samples)[0]))
        return Features(samples, images.labels(split, samples), describe(latent, True, "patches"))

    train, test = features("train", 200), features("test", 100)
    logged = probed(with_probe)[6]
    assert logged["rank/rankme"] == pytest.approx(rankme(test.values), rel=1e-3)
    assert logged["knn/top1"] == pytest.approx(knn_accuracy(train, test, 20), abs=0.01)
    assert 0 < logged["perf/probe_share"] < 1


def test_online_probe_on_two_ranks_logs_the_scores_of_one(with_probe: Path, built_in: Path, tmp_path: Path) -> None:
    words = (*STEPS, *PROBE, "data.workers=0")
    run(command(tmp_path, built_in, *words, "name=two", ranks=2))
    one, two = probed(with_probe), probed(tmp_path / "two")
    assert one.keys() == two.keys()
    for step in one:
        assert two[step]["rank/rankme"] == pytest.approx(one[step]["rank/rankme"], rel=1e-3)
        assert two[step]["knn/top1"] == pytest.approx(one[step]["knn/top1"], abs=0.02)


def test_online_probe_without_test_images_logs_rankme_only(built_in: Path, tmp_path: Path) -> None:
    only_train = ("data.source=null", f"data.path={built_in}/built_in/digits/train", "data.workers=0", "val_every=null")
    folder = trained(tmp_path, built_in, "rank", *only_train, *PROBE)
    assert list(probed(folder)) == [2, 4, 6]
    assert all("knn/top1" not in row for row in probed(folder).values())
