"""CIFAR-10 in ten minutes of two cores, or one minute of a GPU: python -m benchmarks.ten_minutes --data FOLDER

How good is an encoder after so many seconds, whatever made it? Each entry is a program that trains the model of
cifar10_tiny (or another) and writes its weights; all are measured by the same code on the same 10,000 test images.

clock     from the start of the entry's process to its end: imports, start of the workers, training and writing are in
          it. Only the decoding of the images into memory, for those that want that, precedes it, as a download would.
steps     short runs of each entry, beforehand and outside the budget, give the seconds of its start and of a step, and
          these the steps of the run itself, so that its schedule ends with the budget. The seconds that it took stand
          in the table; those more than 3 % beyond the budget are marked "over", those below nine tenths "under": the
          machine was not as fast as before, and the row is to be measured again (delete its folder).
settings  own: those that the entry's project publishes. ours: AdamW as it was found for cifar10_tiny (rate, batch,
          warm-up, betas, crops) in the entry's plain script. Model, scale of the pixels and target (normalised pixels
          of each hidden patch) are the same for all, because the loss depends on them.
measured  loss: 75 % hidden by the same masks. kNN: 20 neighbours among all training images. linear: logistic regression
          on 10,000 of them. All by eval.py's probes on the mean of the patch tokens, after `mae.load` of the weights;
          before that, loss and features of some images have to equal those of the entry's own forward pass.

Another framework enters as a program of its own: see benchmarks/entries/contract.py. Settings of train.py stand behind
the name of our entry: --entries ours "ours optim=muon global_batch=128". Rows that are measured stay in --out: the same
command carries on after them.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir

import mae
from benchmarks.entries.contract import Proof, TrainingImages
from data.config import DataConfig
from data.datamodule import ShardDataModule
from data.evaluation import EvaluationImages
from mae.distributed.launch import Topology
from tasks.config import plain_settings, validate
from tasks.evaluate import EvalConfig, evaluate

ROOT = Path(__file__).resolve().parents[1]
AIM = 0.98  # share of the budget that the forecast of a run may fill
LEAST, MOST = 0.9, 1.03  # shares of the budget outside which a run is marked
PILOT_STEPS, PILOT_SHARE = 20, 0.05  # steps of the first short run; share of the budget by which the last one is longer
LOSS, FEATURES = 1e-4, 1e-3  # largest relative difference between an entry's own forward pass and that of its file


class Row(NamedTuple):
    """An entry with one of the two settings."""

    entry: str
    settings: str

    @property
    def program(self) -> list[str]:
        """Returns what follows `python`: the module or file of the entry."""
        name = shlex.split(self.entry)[0]
        return [str(Path(name).resolve())] if name.endswith(".py") else ["-m", f"benchmarks.entries.{name}"]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.entry)[1:]


@dataclass(frozen=True)
class Conditions:
    """What is the same for all rows of a table."""

    data: str
    seconds: float
    steps: int | None
    device: str
    precision: str
    workers: int


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards with a training and a test part")
    parser.add_argument("--seconds", type=float, default=600.0, help="the budget of each run")
    parser.add_argument("--entries", nargs="+", default=["ours", "transformers", "lightly"])
    parser.add_argument("--settings", nargs="+", default=["own", "ours"], choices=["own", "ours"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each entry")
    parser.add_argument("--steps", type=int, help="steps of each run, instead of as many as fit into the budget")
    parser.add_argument("--out", type=Path, default=Path("runs/ten_minutes"))
    given = parser.parse_args(words)
    rows = [Row(entry, settings) for entry in given.entries for settings in choose_settings(entry, given.settings)]
    data, precision = str(given.data.resolve()), choose_precision(given.device)
    conditions = Conditions(data, given.seconds, given.steps, given.device, precision, given.workers)
    out = given.out.resolve()
    require_same(out, conditions)
    for row in rows:
        require_program(row)
    images = out / "images.npz"
    if not images.is_file():
        decode_images(conditions, out)
    results = []
    for row in rows:
        folder = out / f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', row.entry)}-{row.settings}-seed{given.seed}"
        if not (folder / "result.json").is_file():
            enter(row, given.seed, conditions, images, folder)
        results.append(json.loads((folder / "result.json").read_text()))
    table = draw_table(results)
    (out / "table.json").write_text(json.dumps({"conditions": asdict(conditions), "rows": results}, indent=1))
    (out / "table.md").write_text(table)
    print(f"\n{table}\n{out}: table.md, table.json")


def choose_settings(entry: str, wanted: list[str]) -> list[str]:
    """Returns the settings to measure an entry with: ours has only its own."""
    return ["ours"] if shlex.split(entry)[0] == "ours" else wanted


def choose_precision(device: str) -> str:
    """Returns bf16 where the hardware multiplies it, for all entries alike."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch sees no GPU: use --device cpu")
    fits = torch.cuda.is_bf16_supported(False) if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fits else "float32"


def require_same(out: Path, conditions: Conditions) -> None:
    """Ends the program if the folder holds rows that were measured under other conditions, or is somebody else's."""
    file, asked = out / "conditions.json", asdict(conditions)
    if file.is_file():
        found = json.loads(file.read_text())
        if differing := [name for name in asked if found.get(name) != asked[name]]:
            name = differing[0]
            raise SystemExit(
                f"{out} holds rows with {name}={found.get(name)}, not {asked[name]}, and the rows of a table share the "
                "conditions: choose another folder with --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty, and not of this program: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asked, indent=1))


def require_program(row: Row) -> None:
    """Ends the program if that of an entry does not start, for lack of its library say."""
    tried = subprocess.run([sys.executable, *row.program, "--help"], cwd=ROOT, capture_output=True, text=True)
    if tried.returncode:
        reason = (tried.stderr.strip() or "no message").splitlines()[-1]
        raise SystemExit(
            f"entry {row.entry} does not start: {reason}. Install what it needs (pip install -e '.[bench]'), or "
            "leave it out of --entries"
        )


def decode_images(conditions: Conditions, out: Path) -> None:
    """Writes the training images for entries that do not read shards."""
    config = DataConfig.model_validate(data_settings(conditions))
    data = ShardDataModule(config, image_size=(32, 32), channels=3, seed=0, global_batch=1, micro_batch=256)
    images = EvaluationImages(data, 256)
    loaded = [batch["images"].clone() for batch in images.batches("train", images.samples("train", None))]
    TrainingImages(torch.cat(loaded).permute(0, 2, 3, 1).numpy(), config.mean, config.std).save(out / "images.npz")


def data_settings(conditions: Conditions) -> dict[str, Any]:
    """Returns the data settings of cifar10_tiny on these shards."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose("train", overrides=["experiment=cifar10_tiny"])
    return plain_settings(raw.data) | {"path": conditions.data, "workers": conditions.workers}


def enter(row: Row, seed: int, conditions: Conditions, images: Path, folder: Path) -> None:
    """Runs an entry, measures its weights and writes result.json."""

    def run(steps: int, out: Path) -> float:
        return run_program(row, ["--steps", str(steps), "--seed", str(seed)], conditions, images, out)

    steps = conditions.steps or fit_steps(lambda steps: run(steps, folder / "pilot"), conditions.seconds, row.entry)
    print(f"{row.entry} ({row.settings}): {steps:,} steps", flush=True)
    seconds = run(steps, folder)
    print(f"{row.entry} ({row.settings}): {seconds:.0f} s; measuring", flush=True)
    if (folder / "proof.pt").is_file():
        check_proof(row.entry, Proof.load(folder / "proof.pt"), folder / "weights")
    result = {
        **row._asdict(),
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "budget": "" if conditions.steps else judge(seconds / conditions.seconds),
        "report": json.loads((folder / "report.json").read_text()),
        **measure(folder, conditions),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def judge(share: float) -> str:
    """Returns what the table says of a run that took this share of its budget: nothing where it kept to it."""
    return "(over)" if share > MOST else "(under)" if share < LEAST else ""


def run_program(row: Row, words: list[str], conditions: Conditions, images: Path, out: Path) -> float:
    """Runs the program of an entry in a new folder and returns its seconds from start to end."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    places = ["--data", conditions.data, "--images", str(images), "--out", str(out)]
    machine = ["--device", conditions.device, "--precision", conditions.precision, "--workers", str(conditions.workers)]
    words = [*row.program, *places, *machine, "--settings", row.settings, *words, *row.words]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if conditions.device == "cpu" else {}
    with (out / "log.txt").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | hidden,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # interrupted: an entry may have started others
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.perf_counter() - started
    if code:
        raise SystemExit(f"entry {row.entry} ended with {code}: see {out / 'log.txt'}")
    return seconds


def fit_steps(run: Callable[[int], float], seconds: float, entry: str) -> int:
    """Returns how many steps fit into so many seconds, from short runs: a straight line through start and steps.

    run  (steps) -> seconds
    """
    first, steps = run(PILOT_STEPS), PILOT_STEPS
    while True:
        steps *= 4
        last = run(steps)
        if last - first >= PILOT_SHARE * seconds:
            break
    per_step = (last - first) / (steps - PILOT_STEPS)
    start = first - PILOT_STEPS * per_step
    fitting = int((AIM * seconds - start) / per_step)
    if fitting < 1:
        raise SystemExit(f"{seconds:g} s are too few for entry {entry}, which starts in {start:.0f} s: raise --seconds")
    return fitting


def check_proof(entry: str, proof: Proof, weights: Path) -> None:
    """Ends the program unless what is read from the weights is the function that the entry trained."""
    model = mae.load(weights)
    assert isinstance(model, mae.MaskedAutoencoder)
    with torch.no_grad():
        loss, features = model(proof.images, proof.noise).loss, model.encode(proof.images)[:, 1:].mean(dim=1)
    for name, ours, theirs, limit in (
        ("loss", loss, proof.loss, LOSS),
        ("features", features, proof.features, FEATURES),
    ):
        if (difference := float((ours - theirs).abs().max() / theirs.abs().max())) > limit:
            raise SystemExit(
                f"entry {entry}: {name} computed from its weights here differ by {difference:.1e} from those of its "
                f"own forward pass, where {limit:.0e} is allowed"
            )


def measure(folder: Path, conditions: Conditions) -> dict[str, dict[str, float]]:
    """Returns {"trained": {"loss", "knn", "linear"}, "untrained": {…}} by eval.py's probes."""
    found: dict[str, Any] = {}
    for probe, words in (
        ("reconstruct", ["probe.test_images=null", "probe.ratios=[0.75]"]),
        ("knn", []),
        ("linear", ["probe.strengths=[0.01,0.1]"]),
    ):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            raw = compose("eval", overrides=[f"probe={probe}", *words])
        raw.checkpoint, raw.out = str(folder / "weights"), str(folder / "eval")
        raw.data = {name: value for name, value in data_settings(conditions).items() if name in raw.data}
        with (folder / f"{probe}.txt").open("w") as file, redirect_stdout(file):
            evaluate(validate(EvalConfig, plain_settings(raw)), Topology())
        found[probe] = json.loads((folder / "eval" / f"{probe}.json").read_text())
    return {
        model: {
            "loss": found["reconstruct"][model]["loss"]["0.75"],
            "knn": found["knn"][model]["top1"],
            "linear": found["linear"][model]["top1"],
        }
        for model in ("trained", "untrained")
    }


def draw_table(results: list[dict[str, Any]]) -> str:
    """Returns the results as a table in Markdown, with the first entry's untrained model below."""
    heads = ("entry", "settings", "batch", "steps", "seconds", "loss", "kNN", "linear")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in results:
        entry, report = f"{row['entry']} ({row['report']['version']})", row["report"]
        seconds = " ".join(filter(None, (f"{row['seconds']:.0f}", row["budget"])))
        cells = (entry, row["settings"], str(report["batch"]), f"{row['steps']:,}", seconds, scores(row["trained"]))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| untrained | | | | | {scores(results[0]['untrained'])} |")
    return "\n".join(lines) + "\n"


def scores(found: dict[str, float]) -> str:
    return f"{found['loss']:.4f} | {found['knn']:.2%} | {found['linear']:.2%}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
