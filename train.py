"""Train what `task` says, by default a masked autoencoder: python train.py [experiment=NAME] [SETTING=VALUE ...]"""

import re
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from mae.distributed.stop import stop_at_once
from tasks.cli import run_program
from tasks.words import is_multirun


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="train")
def main(raw: DictConfig) -> None:
    from tasks.train import launch  # torch takes seconds: --help and completion do without

    launch(raw, HydraConfig.get())


def prepare(words: list[str]) -> list[str]:
    """Returns the words for Hydra. In a multirun (-m) they name each run's folder after the settings that differ."""
    # `plan` and `suggest` are groups of settings, to which Hydra cannot assign true.
    groups = r"^(plan|suggest)=(true|false)$"
    words = [re.sub(groups, r"\1.show=\2", word, flags=re.IGNORECASE) for word in words]
    if not is_multirun(words):
        return words
    # Values of options, as of --config-dir, are no settings.
    settings = [word for word in words if word[:1] == "~" or ("=" in word and word[:1] != "-")]
    parsed = OverridesParser.create().parse_overrides(settings)
    if not any(override.is_sweep_override() for override in parsed):
        return words  # a single run, for a launcher
    shared = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    exclude = "hydra.job.config.override_dirname.exclude_keys"
    return [*words, f"{exclude}=[{','.join([*shared, 'trial'])}]", "trial=${hydra:job.override_dirname}"]


if __name__ == "__main__":
    with stop_at_once():
        run_program(main, prepare)
