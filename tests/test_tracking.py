"""metrics.csv, Weights & Biases and TensorBoard, across restarts."""

import json
from pathlib import Path

from mae.csvlog import MetricsCSV, read_metrics
from tests.processes import command, kill, losses, run, start, wait_for_checkpoint


def test_rows_beyond_the_resumed_step_are_cut_and_new_columns_fit_in(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": 1 / step}, step)
    first.log_metrics({"val/loss": 0.5}, 3)
    with open(path, "a") as file:
        file.write("4,0.2")  # a line that was cut off in writing
    again = MetricsCSV(path, resumed_step=2)
    again.log_metrics({"train/loss": 0.25}, 3)
    assert read_metrics(path) == [
        {"step": "1", "train/loss": "1.0"},
        {"step": "2", "train/loss": "0.5"},
        {"step": "3", "train/loss": "0.25"},
    ]
    again.log_metrics({"knn/top1": 0.75}, 3)
    assert read_metrics(path)[-1] == {"step": "3", "knn/top1": "0.75"}


def test_wandb_goes_offline_without_a_key_and_keeps_its_id(tmp_path: Path, built_in: Path) -> None:
    words = command(
        tmp_path,
        built_in,
        "name=tracked",
        "logger=wandb",
        "max_steps=200",
        "checkpoint.every_steps=5",
        "data.workers=0",
    )
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_SILENT": "true"}
    process = start(words, **home)
    wait_for_checkpoint(process, tmp_path / "tracked")
    kill(process)
    run([*words, "max_steps=40"], **home)
    folder = tmp_path / "tracked"
    offline = [path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    assert set(offline) == {(folder / "wandb_id.txt").read_text()}
    steps = [int(step) for step, name in losses(folder) if name == "train/loss"]
    assert steps == list(range(1, max(steps) + 1))
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert [bool(start["step"]) for start in starts] == [False, True]


def test_tensorboard_writes_events(tmp_path: Path, built_in: Path) -> None:
    run(command(tmp_path, built_in, "name=board", "logger=tensorboard", "max_steps=3", "data.workers=0"))
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
