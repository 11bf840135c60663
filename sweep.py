"""Search hyper-parameters, one ordinary run of train.py per trial: python sweep.py sweep=NAME [sweep.SETTING=VALUE]"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from tasks.cli import run_program


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="sweep")
def main(raw: DictConfig) -> None:
    try:
        from tasks.search.sweep import launch  # seconds: --help and completion do without
    except ModuleNotFoundError as error:
        sys.exit(f"error: a sweep needs the package {error.name}: pip install -e '.[sweep]'")

    launch(raw)


if __name__ == "__main__":
    run_program(main)
