"""Probes agree with scikit-learn, and eval.py measures a run beside its untrained encoder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mae.features import describe
from mae.launch import Topology
from mae.probes.knn import knn_accuracy
from mae.probes.linear import linear_accuracy
from tests.conftest import ROOT
from tests.test_experiments import REDUCED, compose
from train import train


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def test_knn_agrees_with_scikit_learn(digits) -> None:
    x, y = digits
    ours = knn_accuracy(x[:1200], y[:1200], x[1200:], y[1200:], k=20)
    theirs = KNeighborsClassifier(20, metric="cosine").fit(x[:1200], y[:1200]).score(x[1200:], y[1200:])
    assert ours == pytest.approx(theirs, abs=5 / 597)  # equal votes are decided differently


def test_knn_of_one_neighbour_is_exactly_the_nearest(digits) -> None:
    x, y = digits
    theirs = KNeighborsClassifier(1, metric="cosine").fit(x[:1200], y[:1200]).score(x[1200:], y[1200:])
    assert knn_accuracy(x[:1200], y[:1200], x[1200:], y[1200:], k=1) == pytest.approx(theirs)


def test_features_without_information_give_chance(digits) -> None:
    _, y = digits
    noise = torch.tensor(np.random.default_rng(0).normal(size=(len(y), 32)), dtype=torch.float32)
    accuracy, _ = linear_accuracy(noise[:1200], y[:1200], noise[1200:], y[1200:], [1e-3, 1.0])
    assert accuracy < 0.2
    assert knn_accuracy(noise[:1200], y[:1200], noise[1200:], y[1200:]) < 0.2


def test_the_linear_probe_reads_digits(digits) -> None:
    x, y = digits
    accuracy, strength = linear_accuracy(x[:1200], y[:1200], x[1200:], y[1200:], [1e-3, 1e-1])
    assert accuracy > 0.88 and strength in (1e-3, 1e-1)


def test_pooling_leaves_the_class_token_out_or_takes_it_alone() -> None:
    latent = torch.arange(12, dtype=torch.float32).view(1, 4, 3)
    assert describe(latent, True, "patches").tolist() == [[6, 7, 8]]
    assert describe(latent, False, "patches").tolist() == [[4.5, 5.5, 6.5]]
    assert describe(latent, True, "class_token").tolist() == [[0, 1, 2]]


def test_a_run_is_evaluated_and_summarised_from_the_command_line(tmp_path: Path, built_in: Path) -> None:
    config = compose(
        f"runs={tmp_path}", f"data.root={built_in}", *REDUCED, "model.image_size=32", "name=run", "max_steps=4"
    )
    train(config, Topology(rank=0, ranks=1, devices=1, nodes=1))
    for probe in ("knn", "linear"):
        command = [sys.executable, "eval.py", f"checkpoint={config.run}", f"probe={probe}", "probe.train_images=200"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result = json.loads((config.run / "eval" / f"{probe}.json").read_text())
        assert result["train_images"] == 200 and result["test_images"] == 359
        # Four steps of a narrow model, or none: both far above chance (1/10), and not the same encoder.
        assert min(result["trained"]["top1"], result["untrained"]["top1"]) > 0.2
        assert f"{result['trained']['top1']:.2%}" in done.stdout
    done = subprocess.run([sys.executable, "-m", "mae.summary", config.run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "knn accuracy" in done.stdout and "step-00000004.ckpt" in done.stdout
