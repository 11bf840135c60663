"""benchmarks/ten_minutes.py: steps that fit the budget, entries whose weights are the same function when read here."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.entries.contract import Proof, TrainingImages
from benchmarks.entries.plain_loop import OURS, prove, rate
from benchmarks.ten_minutes import Conditions, Row, check_proof, fit_steps, judge, main, require_same
from tests.test_eval import pack_coloured


def images(count: int) -> TrainingImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return TrainingImages(pixels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_steps_follow_from_the_start_and_a_step_of_short_runs() -> None:
    runs: list[int] = []

    def run(steps: int) -> float:
        runs.append(steps)
        return 8 + steps / 10

    assert fit_steps(run, 600, "ours") == (0.98 * 600 - 8) * 10
    assert runs == [20, 80, 320]  # 30 s apart, a twentieth of the budget


def test_budget_shorter_than_the_start_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"20 s are too few for entry slow, which starts in 30 s"):
        fit_steps(lambda steps: 30 + steps / 10, 20, "slow")


def test_run_that_left_its_budget_is_marked() -> None:
    assert [judge(share) for share in (0.5, 0.95, 1.02, 1.04)] == ["(under)", "", "", "(over)"]


def test_schedule_of_the_peers_rises_to_the_peak_and_falls_to_zero() -> None:
    rates = [rate(step, 100, OURS) for step in range(101)]
    assert rates[0] == 0 and max(rates) == rates[10] == 1 and rates[100] == 0
    assert rates[11:] == sorted(rates[11:], reverse=True)


def test_entry_is_a_module_or_a_file_with_words_of_its_own() -> None:
    assert Row("ours optim=muon", "ours").program == ["-m", "benchmarks.entries.ours"]
    assert Row("ours optim=muon", "ours").words == ["optim=muon"]
    assert Row("/home/me/jepa.py", "own").program == ["/home/me/jepa.py"]


@pytest.mark.parametrize(("library", "model"), [("transformers", "ViTMAE"), ("lightly", "LightlyMAE")])
def test_weights_of_an_entry_are_read_as_the_function_that_it_trained(library, model, tmp_path: Path) -> None:
    pytest.importorskip(library)
    peer = getattr(importlib.import_module(f"benchmarks.entries.{library}"), model)()
    for parameter in peer.module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)  # biases and norms that are not told apart while they are 0 and 1
    peer.module.eval()
    peer.save(tmp_path / "weights")
    proof = prove(peer, images(16))

    check_proof(library, proof, tmp_path / "weights")

    with pytest.raises(SystemExit, match=f"entry {library}: features computed from its weights here differ by"):
        check_proof(library, proof._replace(features=proof.features + 1), tmp_path / "weights")
    proof.save(tmp_path / "proof.pt")
    assert torch.equal(Proof.load(tmp_path / "proof.pt").noise, proof.noise)


def test_rows_of_other_conditions_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    asked = Conditions("/data", 600, None, "cpu", "bf16", 2)
    require_same(tmp_path / "out", asked)
    require_same(tmp_path / "out", asked)
    with pytest.raises(SystemExit, match="holds rows with seconds=600, not 60, and the rows of a table share"):
        require_same(tmp_path / "out", replace(asked, seconds=60))
    with pytest.raises(SystemExit, match="is not empty, and not of this program"):
        require_same(tmp_path, asked)


@pytest.mark.slow
def test_table_compares_all_entries_and_is_carried_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly")
    shards = pack_coloured(tmp_path, {"train": [0, 1, 2] * 30, "val": [0, 1, 2] * 4})
    out = tmp_path / "out"
    words = ["--data", str(shards), "--steps", "2", "--settings", "ours", "--workers", "0", "--out", str(out)]

    main([*words, "--entries", "ours"])
    main([*words, "--entries", "ours", "transformers", "lightly"])

    said = capsys.readouterr().out
    assert said.count("ours (ours): 2 steps") == 1  # the second table takes its row over
    table = (out / "table.md").read_text()
    assert [line.split(" (")[0] for line in table.splitlines()[2:5]] == ["| ours", "| transformers", "| lightly"]
    for row in json.loads((out / "table.json").read_text())["rows"]:
        assert row["report"]["batch"] == 64 and 0 < row["trained"]["loss"] < 10
