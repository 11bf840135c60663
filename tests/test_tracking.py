"""metrics.csv, Weights & Biases, TensorBoard and MLflow over restarts: one run, no step lost, none with two values."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import wandb
import yaml
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from mlflow import MlflowClient
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae.errors import ConfigError
from mae.export.__main__ import main as export
from mae.run.checkpoint_files import checkpoints
from mae.run.folder import clear_run_folder
from mae.run.metrics import MetricsCSV, read_metrics
from mae.run.tracker_identity import ensure_home, open_mlflow, open_wandb, reopen_wandb, tracked_run, wandb_id
from tasks.loggers import check_trackers, open_loggers
from tasks.search.config import SweepConfig
from tasks.search.sweep import open_study
from tests import wandb_files
from tests.conftest import ROOT
from tests.processes import command, finish, losses, run, start, wait_for_checkpoint
from tests.test_experiments import compose
from tests.wandb_server import WandbServer

STEPS = 80
REPEATED = ("train/loss", "train/lr", "val/loss")  # the others are timings


def test_metrics_csv_cuts_rows_after_the_resumed_step_and_adds_columns(tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """A run that was killed between two checkpoints, W&B's process too, then stopped, then finished on two ranks."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [
        "name=tracked",
        "logger=[wandb,tensorboard,mlflow]",
        f"max_steps={STEPS}",
        "checkpoint.every_steps=5",
        "checkpoint.artifacts=reference",
        "pictures_every=20",
        "data.workers=0",
    ]
    words = command(runs, built_in, *settings)
    folder, home = runs / "tracked", {"HOME": str(runs), "WANDB_API_KEY": ""}
    process = start(words, **home)
    wait_for_step(process, folder, 18)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    process = start(words, **home)
    wait_for_checkpoint(process, folder, 40)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    run(command(runs, built_in, *settings, ranks=2), **home)
    return folder


@contextmanager
def serving() -> Iterator[WandbServer]:
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(int(row["step"]) >= step for row in read_metrics(folder / "metrics.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def parts(folder: Path) -> list[Path]:
    """Returns the offline files of a run, in the order of its starts."""
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def assert_whole(folder: Path, logged: list[dict[str, Any]]) -> None:
    """Each step that metrics.csv has, with its values, however often it was logged."""
    found = defaultdict(set)
    for row in logged:
        for name in REPEATED:
            if name in row:
                found[str(row["trainer/global_step"]), name].add(row[name])
    expected = {key: {float(value)} for key, value in losses(folder).items()}
    assert len([key for key in expected if key[1] == "train/loss"]) == STEPS
    assert found == expected


@pytest.mark.slow
def test_wandb_files_of_a_killed_run_have_one_id_and_one_value_per_step(tracked: Path) -> None:
    files = parts(tracked)
    assert len(files) == 3
    assert {file.stem for file in files} == {f"run-{(tracked / 'wandb_id.txt').read_text()}"}
    logged = [wandb_files.rows(file) for file in files]
    assert_whole(tracked, [row for rows in logged for row in rows])
    steps = [{row["trainer/global_step"] for row in rows if "train/loss" in row} for rows in logged]
    assert steps[0] & steps[1] and steps[1] & steps[2]  # some were indeed repeated
    numbers = [row["_step"] for rows in logged for row in rows]
    assert numbers == sorted(set(numbers))  # so that W&B takes no row for an earlier one
    starts = json.loads((tracked / "environment.json").read_text())["starts"]
    assert [bool(start["step"]) for start in starts] == [False, True, True]


@pytest.mark.slow
def test_wandb_config_has_settings_derived_values_and_the_git_commit(tracked: Path) -> None:
    told = wandb_files.config(parts(tracked)[-1])
    settings = yaml.safe_load((tracked / "config.yaml").read_text())
    assert told["model"] == settings["model"] and told["optim"] == settings["optim"]
    assert told["derived"] == json.loads((tracked / "derived.json").read_text())
    start = told["environment"]["starts"][0]
    assert len(start["git"]) == 40 and isinstance(start["git_modified"], bool)
    assert told["environment"]["packages"]["torch"]


@pytest.mark.slow
def test_wandb_has_reconstruction_tables_and_a_version_per_checkpoint(tracked: Path) -> None:
    artifacts = [artifact for file in parts(tracked) for artifact in wandb_files.artifacts(file)]
    identity = (tracked / "wandb_id.txt").read_text()
    saved = [artifact for artifact in artifacts if artifact.name == f"model-{identity}"]
    steps = [json.loads(artifact.metadata)["step"] for artifact in saved]
    assert set(range(5, STEPS + 1, 5)) <= set(steps)
    for step, artifact in zip(steps, saved, strict=True):
        assert artifact.type == "model" and set(artifact.aliases) == {"latest", f"step-{step}"}
    reference = saved[-1].manifest.contents[0].ref
    assert reference == checkpoints(tracked)[0].resolve().as_uri()
    tables = [file for part in parts(tracked) for file in part.parent.glob("files/media/table/reconstructions_*.json")]
    contents = [json.loads(file.read_text()) for file in tables]
    assert {row[0] for table in contents for row in table["data"]} == {20, 40, 60, 80}
    for table in contents:
        assert table["columns"] == ["step", "original", "masked", "reconstruction"] and len(table["data"]) == 8


@pytest.mark.slow
def test_wandb_sync_uploads_all_starts_as_one_run(tracked: Path) -> None:
    with serving() as server:
        words = [sys.executable, "-m", "wandb", "sync", str(tracked / "wandb")]
        environment = os.environ | server.environment | {"HOME": str(tracked.parent)}
        subprocess.run(words, cwd=tracked.parent, env=environment, check=True, capture_output=True, timeout=180)
        assert set(server.runs) == {(tracked / "wandb_id.txt").read_text()}
        assert_whole(tracked, server.rows(*server.runs))


@pytest.mark.slow
def test_tensorboard_has_each_step_of_a_resumed_run_once(tracked: Path) -> None:
    board = EventAccumulator(str(tracked / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in REPEATED:
        expected = [step for step, metric in losses(tracked) if metric == name]
        assert [str(event.step) for event in board.Scalars(name)] == expected
    assert len(list((tracked / "tensorboard").glob("events.out.tfevents.*"))) >= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*")  # MLflow's own use of SQLAlchemy
def test_mlflow_logs_a_resumed_run_as_one_run(tracked: Path) -> None:
    client = MlflowClient(f"sqlite:///{tracked}/mlflow.db")
    experiment = client.get_experiment_by_name("mae")
    assert experiment is not None
    (mlflow_run,) = client.search_runs([experiment.experiment_id])
    assert mlflow_run.info.run_id == (tracked / "mlflow_id.txt").read_text()
    assert mlflow_run.data.params["derived/total_steps"] == str(STEPS)
    history = client.get_metric_history(mlflow_run.info.run_id, "train/loss")
    found = {(str(point.step), "train/loss"): str(point.value) for point in history}
    assert found == {key: value for key, value in losses(tracked).items() if key[1] == "train/loss"}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B in this process, without a server; what it leaves in the environment is taken back."""
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


@pytest.mark.slow
def test_wandb_export_artifact_names_its_checkpoint(tracked: Path, tmp_path: Path, offline: None) -> None:
    assert export([str(tracked), "--to", "timm", "--out", str(tmp_path / "e.safetensors"), "--wandb"]) == 0
    (artifact,) = wandb_files.artifacts(wandb_files.ended(parts(tracked)[-1]))
    identity = (tracked / "wandb_id.txt").read_text()
    assert (artifact.name, artifact.type) == (f"timm-{identity}", "export")
    assert json.loads(artifact.metadata)["made_from"] == f"model-{identity}:step-{STEPS}"
    contents = {entry.path: entry.ref for entry in artifact.manifest.contents}
    assert set(contents) == {"e.safetensors", "e.safetensors.json", "model.ckpt"}
    assert contents["model.ckpt"] == checkpoints(tracked)[0].resolve().as_uri()


@pytest.mark.slow
def test_wandb_summary_gains_probe_results_and_keeps_the_last_values(tracked: Path, offline: None) -> None:
    (tracked / "eval").mkdir()
    found = {"probe": "knn", "trained": {"top1": 0.5}, "untrained": {"top1": 0.25}, "settings": {"k": 20}}
    (tracked / "eval" / "knn.json").write_text(json.dumps(found))
    with reopen_wandb(tracked):
        pass
    told = wandb_files.summary(wandb_files.ended(parts(tracked)[-1]))
    assert told["eval/knn"] == {"trained": {"top1": 0.5}, "untrained": {"top1": 0.25}}
    assert told["train/loss"] == pytest.approx(float(losses(tracked)[str(STEPS), "train/loss"]))


@pytest.mark.slow
def test_adding_to_an_untracked_or_unfinished_run_raises_config_error(tracked: Path, tmp_path: Path) -> None:
    assert tracked_run(checkpoints(tracked)[0]) == tracked
    with pytest.raises(ConfigError, match="no W&B run to add to"):
        tracked_run(tmp_path)
    (tmp_path / "config.yaml").write_text((tracked / "config.yaml").read_text())
    (tmp_path / "wandb_id.txt").write_text("1")
    with pytest.raises(ConfigError, match="not finished"):
        tracked_run(tmp_path)


def test_overwritten_run_gets_a_new_wandb_id_and_a_second_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb_id.txt").write_text("12345678")
    assert wandb_id(folder) == "12345678"
    monkeypatch.setenv("WANDB_RUN_ID", "trial2")
    with pytest.raises(ConfigError, match="belongs to the W&B run 12345678, but WANDB_RUN_ID=trial2"):
        wandb_id(folder)
    clear_run_folder(folder)
    assert wandb_id(folder) == "trial2"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_id(folder) not in ("12345678", "trial2")


def test_disabled_wandb_is_not_opened_and_arguments_that_follow_from_the_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("logger=wandb", f"runs={tmp_path}", "name=run")
    config.run.mkdir()
    for name in ("derived", "environment"):
        (config.run / f"{name}.json").write_text("{}")
    for variable, value in (("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")):
        with monkeypatch.context() as environment, pytest.warns(UserWarning, match="W&B is disabled"):
            environment.setenv(variable, value)
            assert open_loggers(config, 0) == [] and not (config.run / "wandb_id.txt").exists()
    with pytest.raises(ConfigError, match=r"logger\.wandb\.offline is not yours to set: .*WANDB_MODE"):
        check_trackers(compose("logger=wandb", "+logger.wandb.offline=true"))
    with pytest.raises(ConfigError, match=r"logger\.wandb\.log_model is not yours to set: checkpoint\.artifacts does"):
        check_trackers(compose("logger=wandb", "+logger.wandb.log_model=all"))
    with pytest.raises(ConfigError, match="has settings, but is not chosen: add logger=wandb"):
        check_trackers(compose("+logger.wandb.tags=[a]"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert compose("logger=wandb").logger["wandb"]["project"] == "mine"
    with pytest.raises(ConfigError, match=r"logger\.mlflow\.run_id is not yours to set"):
        check_trackers(compose("logger=mlflow", "+logger.mlflow.run_id=1"))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="logger=mlflow needs the package mlflow, which is not installed"):
        check_trackers(compose("logger=mlflow"))


def test_user_without_a_home_gets_one_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    ensure_home(tmp_path)
    assert os.environ["HOME"] == "/home/me"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    ensure_home(tmp_path)
    assert os.environ["HOME"] == str(tmp_path)


@pytest.mark.slow
def test_unreachable_wandb_server_leaves_the_run_offline_with_a_warning(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    settings = {"init_timeout": 1.0}
    with pytest.warns(UserWarning, match="W&B cannot be used"):
        logger = open_wandb(tmp_path, partial(WandbLogger, project="mae", save_dir=str(tmp_path), settings=settings))
    logger.log_metrics({"train/loss": 0.5}, 1)
    logger.experiment.finish()
    (file,) = parts(tmp_path)
    # W&B's own process writes the file, on a busy machine after `finish` has returned.
    deadline = time.monotonic() + 60
    while not wandb_files.rows(file) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["train/loss"] for row in wandb_files.rows(file)] == [0.5]


# MLflow.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*noload.*")
def test_mlflow_run_that_is_gone_is_named_with_the_way_out(tracked: Path, tmp_path: Path) -> None:
    known = (tracked / "mlflow_id.txt").read_text()
    for name in ("mlflow.db", "mlflow_id.txt"):
        shutil.copy(tracked / name, tmp_path)
    make = partial(MLFlowLogger, experiment_name="mae", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    logger = open_mlflow(tmp_path, make, {})
    assert logger.run_id == known
    logger.experiment.delete_run(known)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"no run {known} any more, .* or remove .*mlflow_id.txt to begin a new"):
            open_mlflow(tmp_path, make, {})
        (tmp_path / "mlflow_id.txt").write_text(known := "0" * 32)  # as in another database
    (tmp_path / "mlflow_id.txt").unlink()
    logger = open_mlflow(tmp_path, make, {"long": "x" * 300, "starts": [{"command": ["y" * 300]}]})
    assert logger.run_id == (tmp_path / "mlflow_id.txt").read_text()
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params["long"] == "x" * 249 + "…" and params["starts/0/command"].endswith("y…")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["logger.mlflow.tracking_uri=./mlruns"], r"^MLflow cannot be used \(The filesystem tracking"),
        (["runs='ru?x#1'"], "has a question mark, at which the address of MLflow's database in it ends"),
    ],
)
def test_unusable_mlflow_is_refused_before_anything_is_written(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets it itself when it is used
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match=said):
        check_trackers(compose("name=run", "logger=mlflow", *words))


def test_sweep_folder_with_a_question_mark_is_refused(tmp_path: Path) -> None:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = hydra.compose("sweep", overrides=["sweep=lr_mask", f"sweep.sweeps='{tmp_path}/a?b'"])
    config = SweepConfig.model_validate(OmegaConf.to_container(raw.sweep, resolve=True))
    with pytest.raises(ConfigError, match="question mark, at which the address of the study in it ends"):
        open_study(config)
    assert not list(tmp_path.iterdir())
