"""Several ranks see what one process sees."""

from pathlib import Path

import pytest

from tests.processes import command, losses, run

STEPS = ("precision=32-true", "max_steps=20", "val_every=7", "data.workers=0")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> dict[tuple[str, str], str]:
    runs = tmp_path_factory.mktemp("one")
    run(command(runs, built_in, *STEPS, "name=one"))
    return losses(runs / "one")


def agree(one: dict[tuple[str, str], str], other: dict[tuple[str, str], str]) -> None:
    assert len([key for key in one if key[1] == "train/loss"]) == 20
    assert len([key for key in one if key[1] == "val/loss"]) == 3
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert float(other[key]) == pytest.approx(float(value), abs=1e-5), key


def test_two_ranks_have_the_losses_of_one_process(tmp_path: Path, built_in: Path, one_process) -> None:
    run(command(tmp_path, built_in, *STEPS, "name=two", "micro_batch=16", ranks=2))
    agree(one_process, losses(tmp_path / "two"))


def test_devices_start_torchrun_and_one_process_goes_on(tmp_path: Path, built_in: Path, one_process) -> None:
    """Two ranks started by trainer.devices; from their checkpoint of step 8, one process with another micro-batch."""
    words = command(tmp_path, built_in, *STEPS, "name=elastic", "checkpoint.every_steps=8", "checkpoint.keep=9")
    output = run([*words, "trainer.devices=2"])
    assert "starting 2 ranks with torchrun" in output
    agree(one_process, losses(tmp_path / "elastic"))
    for late in ("step-00000016.ckpt", "step-00000020.ckpt"):
        (tmp_path / "elastic" / "checkpoints" / late).unlink()
    (tmp_path / "elastic" / "summary.json").unlink()
    assert "step-00000008.ckpt" in run([*words, "micro_batch=8"]).replace("\n", "")
    agree(one_process, losses(tmp_path / "elastic"))
