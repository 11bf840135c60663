"""python -m mae.export runs/NAME --to timm --out encoder.safetensors"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mae.errors import CheckpointError, ConfigError
from mae.export.write import export
from mae.formats.available import FORMATS
from mae.formats.given import model_settings
from mae.run.export_artifact import log_export
from mae.run.tracker_identity import reopen_wandb, tracked_run


class ListFormats(argparse.Action):
    """--list: prints the formats and exits, as --help does."""

    def __call__(self, *_: object) -> None:
        table = Table(box=None)
        for column in ("--to", "what it is", "compared with"):
            table.add_column(column)
        for name, fmt in FORMATS.items():
            table.add_row(name, fmt.sentence, fmt.peer if fmt.compare else "names and shapes only")
        Console().print(table)
        sys.exit(0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mae.export", description="Export a pre-trained encoder.")
    parser.add_argument("source", type=Path, help="run folder, checkpoint, .pth, Hugging Face or timm folder")
    parser.add_argument("settings", nargs="*", metavar="model.NAME=VALUE", help="what a file cannot say: num_heads, …")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a file, or a folder for the formats that are one")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="one number, or height and width")
    parser.add_argument("--merge-into", type=Path, metavar="SAM", help="a whole SAM whose encoder is replaced")
    parser.add_argument("--half", action="store_true", help="weights in float16 (onnx, pt2), float32 in and out")
    parser.add_argument("--encoder-only", action="store_true", help="leave out the other parts of a whole SAM")
    parser.add_argument(
        "--weights", choices=("raw", "average"), help="of a run with task.ema (default: those that it validated)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--wandb", action="store_true", help="log it as an artifact of the run's W&B run")
    parser.add_argument("--list", action=ListFormats, nargs=0, help="the formats, a sentence each")
    arguments = parser.parse_intermixed_args(argv)
    size = arguments.image_size and (arguments.image_size[0], arguments.image_size[-1])
    try:
        if size and len(arguments.image_size) > 2:
            raise ConfigError(f"--image-size takes one number, or height and width, not {arguments.image_size}")
        run = tracked_run(arguments.source) if arguments.wandb else None
        card = export(
            arguments.source,
            arguments.to,
            arguments.out,
            image_size=size,
            merge_into=arguments.merge_into,
            encoder_only=arguments.encoder_only,
            overwrite=arguments.overwrite,
            half=arguments.half,
            weights=arguments.weights,
            given=model_settings(arguments.settings),
        )
        if run is not None:
            with reopen_wandb(run) as wandb_run:
                log_export(wandb_run, run, arguments.out, card)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
