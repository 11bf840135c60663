"""python -m mae.export runs/NAME --to timm --out encoder.safetensors"""

import argparse
import hashlib
import sys
from pathlib import Path

import mae
from mae.checkpoint import newest_valid, read_own
from mae.errors import CheckpointError, ConfigError
from mae.export import timm
from mae.run import write_json

FORMATS = {"timm": timm.write}


def export(source: Path, to: str, out: Path, overwrite: bool) -> Path:
    """Writes `out` and a card beside it (same name, .json); returns the card.

    Raises ConfigError when a file is in the way, CheckpointError when the source is bad or the export is not the
    same function.
    """
    card = out.with_suffix(".json")
    for path in (out, card):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists. Choose another --out, or replace it with --overwrite")
    checkpoint = (newest_valid(source) or source) if source.is_dir() else source
    model = mae.load(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    verified = FORMATS[to](model, out)
    own = checkpoint.suffix == ".ckpt"
    write_json(
        card,
        {
            "format": to,
            "source": str(checkpoint),
            "step": read_own(checkpoint)["mae"]["step"] if own else None,
            "config": model.config.model_dump(mode="json"),
            "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
            to: verified,
        },
    )
    print(
        f"{out}: the same features as {checkpoint} "
        f"(largest difference {verified['difference']:.1e} of the largest value)"
    )
    return card


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mae.export", description="Export a pre-trained encoder.")
    parser.add_argument("source", type=Path, help="run folder, checkpoint, .pth or Hugging Face folder")
    parser.add_argument("--to", choices=sorted(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    try:
        export(arguments.source, arguments.to, arguments.out, arguments.overwrite)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
