"""This framework as an entry of benchmarks/ten_minutes.py: train.py experiment=cifar10_tiny, as a user starts it.

Words behind the name are settings of train.py: --entries ours "ours optim=muon global_batch=128".
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.entries.contract import parse_arguments, write_report

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    given = parse_arguments()
    words = [
        "experiment=cifar10_tiny",
        f"data.path={given.data}",
        f"data.workers={given.workers}",
        f"runs={given.out}",
        "name=weights",
        f"seed={given.seed}",
        f"max_steps={given.steps}",
        f"val_every={given.steps}",  # the others do not validate either
        f"trainer={'gpu' if given.device == 'cuda' else 'cpu'}",
        f"precision={'bf16-mixed' if given.precision == 'bf16' else '32-true'}",
        *given.words,
    ]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True)
    derived = json.loads((given.out / "weights" / "derived.json").read_text())
    write_report(given.out, derived["global_batch"], {"words": words, "derived": derived}, version("mae-pretrain"))


if __name__ == "__main__":
    main()
