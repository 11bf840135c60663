"""Benchmarks that want a GPU run at small sizes on whatever there is."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.step import Steps
from tests.processes import completed

MICRO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 64,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}


@pytest.mark.slow
def test_gpu_benchmark_writes_its_table_at_small_sizes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--small", "--rounds", "2", "--out", str(tmp_path / "table.md")]
    finished = completed(words)
    assert finished.returncode == 0, finished.stderr
    table = (tmp_path / "table.md").read_text()
    assert "ViT of width 64, 4 images" in table and "SAM-style encoder" in table and "TFLOP of Muon" in table


def test_step_benchmark_contenders_compute_the_same_loss() -> None:
    steps = Steps(2, torch.device("cpu"), MICRO, peers=("transformers",))
    steps.check()
    assert all(steps.time_step(name, 0, bf16=False) > 0 for name in steps.models)


def test_sampling_benchmark_measures_both_orders_at_small_sizes() -> None:
    sizes = ["--shards", "30", "--samples", "40", "--images", "256", "--rounds", "1"]
    finished = completed([sys.executable, "-m", "benchmarks.sampling", *sizes])
    assert finished.returncode == 0, finished.stderr
    opened, everything, chosen, _, ratio = finished.stdout.splitlines()
    assert opened.startswith("table of 1,200 samples opened") and "all: median" in everything
    assert "chosen: median" in chosen and "1 interleaved pairs" in ratio
