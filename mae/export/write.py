"""Writes an export whole and verified, or not at all, with a card that says where it came from."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mae.errors import CheckpointError, ConfigError
from mae.export.open import open_export
from mae.export.verify import verify
from mae.formats.available import FORMATS
from mae.formats.format import Export, Format
from mae.formats.load import load
from mae.formats.load_sam import load_sam
from mae.formats.load_segmenter import load_segmenter
from mae.formats.opened import open_weights
from mae.models.classifier import Classifier
from mae.run.checkpoint_files import Weights
from mae.run.folder import write_json
from mae.sam.encoder import SamConfig


def export(
    path: Path,
    to: str,
    out: Path,
    *,
    image_size: tuple[int, int] | None = None,
    merge_into: Path | None = None,
    encoder_only: bool = False,
    overwrite: bool = False,
    half: bool = False,
    weights: Weights | None = None,
    given: dict[str, Any] | None = None,
) -> Path:
    """Exports the model in `path` to `out`, with a card: `out`.json beside a file, card.json inside a folder.

    image_size    (height, width) that the export is for; positions are resized
    merge_into    a whole SAM of any library, whose encoder is replaced
    encoder_only  leave out the prompt encoder and mask decoder of a whole SAM
    half          weights in float16, for graphs
    weights       raw or average, of a checkpoint that holds both; None: those that its run validated
    given         fields of MAEConfig or SamConfig that `path` cannot say
    returns       the card

    Raises ConfigError if something is in the way or the format has no place for the model, CheckpointError if the
    source is bad or the export is not the same function. Nothing is left behind then.
    """
    fmt = FORMATS[to]
    refuse_early(fmt, to, out, merge_into, overwrite, half)
    exported = open_export(
        path, fmt, image_size, merge_into, encoder_only=encoder_only, half=half, weights=weights, given=given
    )
    with staged(out) as file:
        how_to_load = fmt.write(exported, file)
        if fmt.read_back:
            read_back(exported, file)
        verification = verify(fmt, exported, file)
        card = {
            "format": to,
            "source": str(exported.path),
            "step": exported.step,
            **({"weights": exported.weights} if exported.weights else {}),
            "config": exported.model.config.model_dump(mode="json"),
            "pixels": exported.scale._asdict(),
            **({"classes": exported.model.class_names} if isinstance(exported.model, Classifier) else {}),
            **({"remarks": list(exported.remarks)} if exported.remarks else {}),
            "load": how_to_load,
            "verification": verification,
            "sha256": {str(part.relative_to(file.parent)): sha256(part) for part in files_under(file.parent)},
        }
        write_json(card_path(file, fmt), card)
    for remark in exported.remarks:
        print(f"{out}: {remark}")
    print(f"{out}: {summary(verification)}")
    return card_path(out, fmt)


def refuse_early(fmt: Format, to: str, out: Path, merge_into: Path | None, overwrite: bool, half: bool) -> None:
    """Raises ConfigError for what can be told before anything is loaded."""
    if fmt.suffix and out.suffix != fmt.suffix:
        raise ConfigError(f"--out {out}: the format {to} is a file whose name ends in {fmt.suffix}")
    if half and not fmt.halves:
        able = " or ".join(name for name, other in FORMATS.items() if other.halves)
        raise ConfigError(f"--half: the format {to} is written in float32; choose --to {able}")
    if lacking := [module for module in fmt.needs if find_spec(module) is None]:
        raise ConfigError(f"--to {to} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    if merge_into is not None and not fmt.whole_sam:
        raise ConfigError(f"--merge-into {merge_into}: the format {to} has no place for a whole SAM")
    card = card_path(out, fmt)
    for path in (out, card):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists. Choose another --out, or replace it with --overwrite")
    if out.is_dir() and (fmt.suffix or not card.exists()):
        raise ConfigError(
            f"{out} is a folder, and no export of this format: --overwrite keeps off. Choose another --out"
        )


def card_path(out: Path, fmt: Format) -> Path:
    return out.with_name(f"{out.name}.json") if fmt.suffix else out / "card.json"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a path called like `out` in a temporary folder, whose files are moved to beside `out` in the end.

    The main file comes last, so that it is there only when everything is.
    """
    stage = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}). Choose another place") from None
    try:
        yield stage / out.name
        parts = sorted(stage.iterdir(), key=lambda part: part.name == out.name)
        for file in files_under(stage):
            file.chmod(stage.stat().st_mode & 0o666)  # some writers let only the owner read
        for part in parts:
            final = out.parent / part.name
            if final.is_dir():
                os.replace(final, stage / "replaced")
            os.replace(part, final)
    finally:
        shutil.rmtree(stage)


def read_back(export: Export, file: Path) -> None:
    """Loads the file again. Raises CheckpointError naming every parameter that differs in a single bit."""
    config, opened, source = export.model.config, open_weights(file, announce=False), export.segmenter or export.model
    if isinstance(config, SamConfig):
        model = (load_sam if export.segmenter is None else load_segmenter)(opened, like=config)
    else:
        model = load(opened, **config.model_dump(include={"num_heads", "decoder_num_heads", "image_size"}))
    back, state = model.state_dict(), source.state_dict()
    same = {key for key in state.keys() & back.keys() if torch.equal(state[key], back[key])}
    if differing := sorted((state.keys() | back.keys()) - same):
        raise CheckpointError(f"the export does not hold the source's weights: {', '.join(differing[:8])} differ")


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(file: Path) -> str:
    with file.open("rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest()


def summary(verification: dict[str, Any]) -> str:
    """Returns the outcome of the verification as a sentence."""
    if verification["compared_with"] is None:
        return f"written; {verification['why']}, so only {verification['checked']} were checked"
    return (
        f"{verification['compared']}, the same in {verification['compared_with']} "
        f"(largest difference {verification['difference']:.1e} of the largest value)"
    )
