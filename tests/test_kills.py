"""SIGKILL in every phase of a run, again and again: the same command ends as if nothing had happened."""

import json
import random
from pathlib import Path

import pytest

from mae.run.checkpoint_files import checkpoints
from tests.killed_run import PHASES
from tests.processes import STEPS_PER_EPOCH, assert_same_run, command, finish, run, start

EVERY = 7
STEPS = 90
ELIGIBLE = {
    "save": range(EVERY, STEPS - 1, EVERY),
    "accumulation": range(1, STEPS - 1),
    "validation": range(20, STEPS - 1, 20),
    "edge": range(STEPS_PER_EPOCH, STEPS - 1, STEPS_PER_EPOCH),
    "anywhere": range(1, STEPS - 8),
}
SETTINGS = (f"max_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "name=killed")


def kills(seed: int, of_each: int) -> list[tuple[int, str]]:
    """(step, phase), ascending: `of_each` in every phase, at random steps."""
    draw = random.Random(seed)
    return sorted((step, phase) for phase in PHASES for step in draw.sample(ELIGIBLE[phase], of_each))


def killed_again_and_again(runs: Path, root: Path, ranks: int, seed: int, of_each: int) -> list[dict]:
    """Runs the same command after every kill, and once more to the end; returns what the runs noted of themselves."""
    log, draw = runs / "kills.jsonl", random.Random(seed)
    micro = f"micro_batch={64 // ranks // 2}"
    for step, phase in [*kills(seed, of_each), (-1, "")]:
        where = {
            "step": step,
            "phase": phase,
            "delay": draw.uniform(0, 0.02),
            "rank": draw.randrange(ranks),
            "log": str(log),
        }
        words = command(runs, root, micro, *SETTINGS, ranks=ranks)
        at = words.index("train.py")
        words[at : at + 1] = ["-m", "tests.killed_run", json.dumps(where)]
        process = start(words)
        output = finish(process, code=0 if step < 0 else None)
        assert step < 0 or process.returncode != 0, f"was not killed in {phase} of step {step}\n{output}"
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "of_each"),
    [
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.timeout(900)
def test_run_killed_in_each_phase_equals_the_uninterrupted_run(
    tmp_path: Path, built_in: Path, ranks: int, of_each: int
) -> None:
    seed = ranks * 100 + of_each
    notes = killed_again_and_again(tmp_path, built_in, ranks, seed, of_each)
    done = [(note["step"], note["phase"]) for note in notes if "phase" in note]
    print(f"seed {seed}, killed at {done}")
    waits = [round(note["first step after"], 1) for note in notes if "first step after" in note]
    print("seconds from the imports to the first step:", waits)
    assert done == kills(seed, of_each)

    run(command(tmp_path / "whole", built_in, f"micro_batch={64 // ranks // 2}", *SETTINGS, ranks=ranks))
    assert_same_run(tmp_path / "killed", tmp_path / "whole" / "killed")
    assert len(checkpoints(tmp_path / "killed")) == 2
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2, "a killed save left something behind"
