"""Words of a command line: written so that Hydra reads what was meant, explained where it does not know them.

1 readable   before Hydra: groups set to null, paths that its grammar cannot read, text that looks like a number
2 setting    a value from elsewhere (a sweep, a closing line) → NAME=VALUE
3 unknown    after Hydra: a name that does not exist → a sentence with the nearest one that does
"""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
ABSENT = ("null", "false", "none")  # in any case: what users write to do without a group
# Settings that are text, whose values may look like numbers: a job's id, a date, the hash of a commit.
TEXT = {"name", "runs", "resume", "init_from", "checkpoint", "out", "sweep.name", "sweep.sweeps"}
TEXT |= {"data.path", "data.val_path", "data.root", "data.cache", "data.sampling", "task.embeddings", "plan.json"}
TEXT |= {"logger.mlflow.experiment_name", "logger.mlflow.run_name", "task.teacher", "task.outputs"}
TEXT |= {f"logger.wandb.{name}" for name in ("project", "name", "group", "entity")}
PLAIN = re.compile(r"[\w./:+-]*", re.ASCII)  # read by Hydra as it stands

# Arguments of Lightning's Trainer that are not passed on -> what does the same here.
INSTEAD = {
    "max_epochs": "set epochs",
    "min_epochs": "set epochs",
    "max_steps": "set max_steps, without trainer",
    "min_steps": "set max_steps, without trainer",
    "limit_train_batches": "set max_steps",
    "overfit_batches": "set max_steps, and data.path to a few images",
    "fast_dev_run": "set max_steps=1 and a name of its own, or plan=true",
    "num_nodes": "torchrun and srun say how many nodes there are (docs/clusters.md)",
    "precision": "set precision, without trainer",
    "accumulate_grad_batches": "set micro_batch; the accumulation follows from it and global_batch",
    "gradient_clip_val": "set optim.grad_clip",
    "gradient_clip_algorithm": "gradients are clipped by their norm, to optim.grad_clip",
    "check_val_every_n_epoch": "set val_every, in steps",
    "val_check_interval": "set val_every, in steps",
    "limit_val_batches": "set val_every=null for no validation during the run, or data.val_path to fewer images",
    "num_sanity_val_steps": "nothing is validated before the first step",
    "log_every_n_steps": "set log_every",
    "logger": "set logger, without trainer",
    "profiler": "set profile=true",
    "enable_checkpointing": "set checkpoint.every_steps",
    "enable_progress_bar": "set log_every; there is a bar on a terminal only",
    "default_root_dir": "set runs and name",
    "sync_batchnorm": "no model here normalises over a batch",
    "use_distributed_sampler": "the order of the samples does not depend on the ranks",
}


def readable(words: list[str]) -> list[str]:
    """Returns words that Hydra reads as they were meant: other words stay as they are."""
    several = is_multirun(words)
    words = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # Hydra finds no settings behind them
    return [new for word in words for new in ([word] if word.startswith("-") else _readable(word, several))]


def is_multirun(words: list[str]) -> bool:
    """Returns True if Hydra shall start a run for each combination of values: by -m, or the beginning of --multirun."""
    return any(
        word in ("-m", "hydra.mode=MULTIRUN") or (word[:3] == "--m" and "--multirun".startswith(word)) for word in words
    )


def _readable(word: str, several: bool) -> list[str]:
    name, equals, value = word.partition("=")
    if not equals:
        return [word]
    parts = value.split(",") if several else [value]
    if name in GROUPS:
        if value.lower() in ABSENT and name != "experiment":  # without a recipe there are no values
            return [] if name == "launcher" else [f"~{name}"]
        if any(_number(part) or part.lower() in ("true", *ABSENT) for part in parts):
            value = ",".join(_quoted(part) for part in parts)
    elif name.lstrip("+") in TEXT and any(_number(part) for part in parts):
        value = ",".join(_quoted(part) for part in parts)
    if PLAIN.fullmatch(value) or value[:1] in ("'", '"', "{") or _parsed(f"{name}={value}") is not None:
        return [f"{name}={value}"]
    if value[0] == "[" and value[-1] == "]":
        return [f"{name}=[{','.join(_quoted(part.strip()) for part in value[1:-1].split(','))}]"]
    return [f"{name}={','.join(_quoted(part) for part in parts)}"]


def setting(name: str, value: Any) -> str:
    """Returns NAME=VALUE for Hydra. Text stays text, but for null, lists and dictionaries in Hydra's own syntax."""
    return f"{name}={in_hydra(value)}"


def in_hydra(value: Any) -> str:
    """Returns a value as Hydra reads it from a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(in_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{in_hydra(entry)}' for key, entry in value.items())}}}"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    parsed = _parsed(f"name={value}")
    if parsed is not None and not parsed.is_sweep_override():
        read = parsed.value()
        if read is None or read == value or isinstance(read, list | dict):
            return value
    return _quoted(value)


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def unknown(name: str, known: Iterable[str]) -> str:
    """Returns the sentence for a setting that does not exist, with the nearest that does."""
    group, _, last = name.rpartition(".")
    if group == "trainer" and last in INSTEAD:
        return f"{name} is not yours to set: {INSTEAD[last]}"
    ends = {other: other.rpartition(".")[2] for other in sorted(known) if other != name}
    beside = [end for other, end in ends.items() if other == f"{group}.{end}".lstrip(".") and end[0] != "_"]
    if near := get_close_matches(last, beside, 1):
        return f"unknown setting {name}: did you mean {f'{group}.{near[0]}'.lstrip('.')}?"
    alike = [other for other, end in ends.items() if get_close_matches(last, [end])]
    if nearest := [other for other in alike if ends[other] == last] or get_close_matches(name, alike, 1, 0.75):
        return f"unknown setting {name}: did you mean {nearest[0]}?"
    if group and beside:
        return f"unknown setting {name}: {group} has {', '.join(beside)}"
    return f"unknown setting {name}: --cfg job lists those that there are"


def choose_one(group: str) -> str:
    """Returns the sentence for a group that is left out and cannot be."""
    options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
    return f"{group} is left out, and cannot be: set {group}= to one of {options}"


def refusal(reason: str, program: str, words: list[str]) -> str:
    """Returns Hydra's reason in one sentence; one about a name that does not exist with the nearest that does."""
    if found := re.search(r"Could not (?:override|delete from config\.?) '([^']+)'", reason):
        left_out = [word[1:] for word in readable(words) if word[:1] == "~"]
        if groups := {"experiment", found[1].partition(".")[0]} & set(left_out) & set(GROUPS):
            return choose_one(min(groups))
        return unknown(found[1], known_settings(program, words))
    if found := re.search(r"Error merging override (\S+)=", reason):
        return f"{found[1]} cannot be replaced whole: set its values one by one, or write a file (docs/sweeps.md)"
    return reason


def known_settings(program: str, words: list[str]) -> list[str]:
    """Returns the names of the settings of a program and of its groups, under the groups chosen in `words`."""
    if not (CONF / f"{program}.yaml").is_file():
        return []  # a program that is no file of its own
    chosen = [word for word in readable(words) if word.partition("=")[0] in GROUPS]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = compose(program, overrides=chosen)
        except (HydraException, OmegaConfBaseException):  # a group of the user's own folder, or a multirun
            config = compose(program)
    return [*GROUPS, *names_in(OmegaConf.to_container(config))]


def names_in(settings: Any, prefix: str = "") -> Iterator[str]:
    """Yields the names of nested settings, groups included."""
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from names_in(value, f"{prefix}{name}.")
