"""docs/examples/wandb_sweep.yaml, run as W&B's agent runs it."""

import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from mae.run.metrics import read_metrics
from tests import wandb_files
from tests.conftest import ROOT
from tests.processes import finish, start

SHORT = ["max_steps=6", "log_every=2", "val_every=6", "online_probe.every=3", "trainer=cpu", "data.workers=0"]


def agent_command(trial: dict[str, object]) -> list[str]:
    """Returns the command that the agent makes of the file and of a trial's parameters."""
    sweep = yaml.safe_load((ROOT / "docs" / "examples" / "wandb_sweep.yaml").read_text())
    assert set(sweep["parameters"]) == set(trial)
    filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    filled |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [str(ROOT / sweep["program"])]}
    words = []
    for word in create_sweep_command(list(sweep["command"])):
        whole = word.startswith("${") and word.endswith("}")
        words += filled[word[2:-1]] if whole else [word]
    return words


@pytest.mark.slow
def test_wandb_trial_has_its_own_folder_the_agents_id_and_the_ranked_metric(
    tmp_path: Path, built_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trial = {"optim.base_lr": 0.002, "model.mask_ratio": 0.6}
    words = [*agent_command(trial), f"data.root={built_in}", *SHORT]
    about = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial2", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    assert words[:2] == ["/usr/bin/env", "python"]
    finish(start([sys.executable, *words[2:]], tmp_path, **about))
    folder = tmp_path / "sweeps" / "sweep1" / "trial2"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["optim"]["base_lr"] == 0.002 and settings["model"]["mask_ratio"] == 0.6
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert file.name == "run-trial2.wandb"
    ranked = [row["knn/top1"] for row in wandb_files.rows(file) if "knn/top1" in row]
    assert ranked == [float(row["knn/top1"]) for row in read_metrics(folder / "metrics.csv") if "knn/top1" in row]
    assert len(ranked) == 2
