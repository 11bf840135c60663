"""Evaluate a frozen encoder beside the same encoder untrained: python eval.py checkpoint=runs/NAME [probe=NAME]"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from tasks.cli import run_program


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="eval")
def main(raw: DictConfig) -> None:
    from tasks.evaluate import launch  # torch takes seconds: --help and completion do without

    launch(raw)


if __name__ == "__main__":
    run_program(main)
