"""Train what `task` says, by default a masked autoencoder: python train.py [experiment=NAME] [SETTING=VALUE ...]"""

import sys
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from tasks.cli import run_program


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="train")
def main(raw: DictConfig) -> None:
    from tasks.train import launch  # torch takes seconds: --help and completion do without

    launch(raw)


def trial_settings(words: list[str]) -> list[str]:
    """Returns settings that name the folder of each run of a multirun (-m) after the settings that differ."""
    if not {"-m", "--multirun"} & set(words):
        return []
    parsed = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    if not any(override.is_sweep_override() for override in parsed):
        return []  # a single run, for a launcher
    shared = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    exclude = "hydra.job.config.override_dirname.exclude_keys"
    return [f"{exclude}=[{','.join([*shared, 'trial'])}]", "trial=${hydra:job.override_dirname}"]


if __name__ == "__main__":
    # `plan` is a group of settings, to which Hydra cannot assign true.
    sys.argv[1:] = ["plan.show=true" if word == "plan=true" else word for word in sys.argv[1:]]
    sys.argv += trial_settings(sys.argv[1:])
    run_program(main)
