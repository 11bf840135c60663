"""python -m mae.report runs/NAME [runs/OTHER ...] [--out FILE] [--no-attention]"""

import argparse
import sys
from pathlib import Path

from mae.errors import CheckpointError, ConfigError
from mae.report.page import write_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mae.report", description="Write what happened in a run, or in several, as one HTML page."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run folder")
    parser.add_argument(
        "--no-attention", action="store_true", help="leave out the attention maps, which need the last checkpoint"
    )
    arguments = parser.parse_args(argv)
    try:
        file = write_report(arguments.runs, arguments.out, with_attention=not arguments.no_attention)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
