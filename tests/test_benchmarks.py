"""Benchmarks that want a GPU run at small sizes on whatever there is."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, sampling
from benchmarks.gpu import GROUPS
from benchmarks.step import Steps
from benchmarks.timed import Bench, Figures, Row
from data.pack import builtin
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
def test_gpu_benchmark_runs_every_row_at_small_sizes_on_a_cpu(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--rounds", "1"]
    finished = completed([*words, "--out", str(tmp_path / "table.md")])

    assert finished.returncode == 0, finished.stderr + finished.stdout
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["group"] for row in rows} == set(GROUPS)
    assert all(row.get("rate", 0) > 0 or row["unavailable"] == "needs a GPU" for row in rows)
    assert len((tmp_path / "table.md").read_text().splitlines()) == len(rows) + 4


@pytest.mark.slow
def test_gpu_benchmark_names_rows_that_fail_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(bench: Bench) -> Iterator[Row]:
        yield "a package", lambda: importlib.import_module("no_such_package")
        yield "an endless one", lambda: time.sleep(60)
        yield "the last", lambda: Figures(2.0)

    monkeypatch.setattr(gpu, "GROUPS", {"vit_base": rows})
    words = ["--only", "vit_base", "--device", "cpu", "--small", "--seconds", "1", "--out", str(tmp_path / "table")]
    with pytest.raises(SystemExit, match="2 of 3 rows failed"):
        gpu.main(words)

    table = (tmp_path / "table.md").read_text().splitlines()
    assert "ModuleNotFoundError: No module named 'no_such_package'" in table[-3]
    assert "Late: longer than 1 seconds" in table[-2]
    assert table[-1] == "| vit_base: the last | 2.0 images/s | - | - | - |"


def test_step_benchmark_contenders_compute_the_same_loss() -> None:
    steps = Steps(2, torch.device("cpu"), MICRO, peers=("transformers",))
    steps.check()
    assert all(steps.time_step(name, 0, bf16=False) > 0 for name in steps.models)


def test_sampling_benchmark_measures_both_orders_at_small_sizes(
    built_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builtin.ensure("digits", built_in)
    sizes = ["--shards", "30", "--samples", "40", "--images", "256", "--rounds", "1"]
    sampling.main([*sizes, "--path", str(built_in / "built_in" / "digits")])
    opened, everything, chosen, _, ratio = capsys.readouterr().out.splitlines()
    assert opened.startswith("table of 1,200 samples opened") and "all: median" in everything
    assert "chosen: median" in chosen and "1 interleaved pairs" in ratio
