"""Saving beside the training: what is written is the step that was saved, one file at a time, whole or not at all."""

import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import mae
from mae.callbacks.save_checkpoints import CheckpointConfig, SaveCheckpoints
from mae.errors import CheckpointError
from mae.run import checkpoint_writer
from mae.run.checkpoint_files import read, verify
from mae.run.checkpoint_writer import (
    BackgroundCheckpointIO,
    describe_saving,
    refuse_full_disk,
    seconds_to_write,
    write_checkpoint,
)
from mae.train.optim import OptimConfig, build_optimizer, checkpoint_bytes


def contents(value: float) -> dict[str, Any]:
    return {"weights": {"a": torch.full((3, 4), value)}, "moments": [torch.full((5,), value, dtype=torch.bfloat16)]}


class Gate:
    """Stands in the place of torch.save: writes once it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.opened, self.save, self.error = threading.Event(), torch.save, error
        monkeypatch.setattr(checkpoint_writer.torch, "save", self)

    def __call__(self, *arguments: Any) -> None:
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        self.save(*arguments)


def test_checkpoint_holds_what_was_saved_whatever_the_training_does_meanwhile(tmp_path: Path, monkeypatch) -> None:
    gate, writer, saved = Gate(monkeypatch), BackgroundCheckpointIO(), contents(1.0)
    counts = saved["counts"] = {"step": 1}
    writer.save_checkpoint(saved, tmp_path / "one")
    saved["weights"]["a"].zero_()
    saved["moments"][0].zero_()
    counts["step"] = 2
    assert not list(tmp_path.glob("one")) and not writer.failed
    gate.opened.set()
    writer.wait()
    found = read(tmp_path / "one")
    verify(tmp_path / "one")
    assert found["counts"] == {"step": 1}
    torch.testing.assert_close(found["weights"], contents(1.0)["weights"], rtol=0, atol=0)
    torch.testing.assert_close(found["moments"], contents(1.0)["moments"], rtol=0, atol=0)


def test_next_checkpoint_waits_for_the_one_before_and_uses_its_memory_again(tmp_path: Path, monkeypatch) -> None:
    gate, writer = Gate(monkeypatch), BackgroundCheckpointIO()
    writer.save_checkpoint(contents(1.0), tmp_path / "one")
    places = [buffer.data_ptr() for buffer in writer.buffers]
    second = threading.Thread(target=writer.save_checkpoint, args=(contents(2.0), tmp_path / "two"))
    second.start()
    second.join(0.1)
    assert second.is_alive() and writer.buffers[0].eq(1).all()
    gate.opened.set()
    second.join(30)
    writer.wait()
    assert [buffer.data_ptr() for buffer in writer.buffers] == places
    assert [float(read(tmp_path / name)["weights"]["a"][0, 0]) for name in ("one", "two")] == [1, 2]


def test_memory_of_another_model_is_not_used_again(tmp_path: Path) -> None:
    writer = BackgroundCheckpointIO()
    for name, saved in {"one": {"a": torch.ones(3), "b": torch.ones(4)}, "two": {"a": torch.ones(4).double()}}.items():
        writer.save_checkpoint(saved, tmp_path / name)
        writer.wait()
        torch.testing.assert_close(read(tmp_path / name), saved, rtol=0, atol=0)


def test_what_follows_a_checkpoint_is_left_out_if_it_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    gate, writer, done = Gate(monkeypatch, OSError(28, "No space left on device")), BackgroundCheckpointIO(), []
    writer.save_checkpoint(contents(1.0), tmp_path / "one")
    writer.then(lambda: done.append("deleted the older ones"))
    gate.opened.set()
    with pytest.raises(CheckpointError, match=r"one cannot be written \(No space left on device\)"):
        writer.wait()
    assert not done and not list(tmp_path.iterdir())


def test_error_in_what_follows_a_checkpoint_is_raised_in_the_run(tmp_path: Path) -> None:
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint(contents(1.0), tmp_path / "one")
    writer.then(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    verify(tmp_path / "one")


def test_time_of_a_save_is_that_of_its_size_and_leaves_nothing(tmp_path: Path) -> None:
    small, large = (seconds_to_write(size, tmp_path / "not" / "yet" / "there") for size in (1000, 2**29))
    assert 0 < small < large and not list(tmp_path.iterdir())


def test_notice_is_asked_for_where_saving_takes_longer_than_schedulers_wait(tmp_path: Path, monkeypatch) -> None:
    small = describe_saving(11_300_000, 500, tmp_path)
    assert small.startswith("11.3 MB every 500 steps, ") and "a warning" not in small
    monkeypatch.setattr(checkpoint_writer, "seconds_to_write", lambda size, folder: size / 1e8)
    said = describe_saving(8_200_000_000, 1000, tmp_path)
    assert said.startswith("8.2 GB every 1,000 steps, 82 s each beside the training; ")
    assert said.endswith("; a warning before the end has to leave 164 s and a step")


def test_start_is_refused_where_the_next_checkpoint_has_no_room(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"room for .* GB, and the next checkpoint takes 1e\+06 GB\. Make"):
        refuse_full_disk(10**15, tmp_path)


def test_start_that_crashes_waits_for_its_checkpoint_before_another_may_have_the_folder(tmp_path, monkeypatch) -> None:
    gate, saving = Gate(monkeypatch), SaveCheckpoints(tmp_path, CheckpointConfig(), None)
    saving.writer.save_checkpoint(contents(1.0), tmp_path / "one")
    threading.Timer(0.1, gate.opened.set).start()
    saving.on_exception(None, None, KeyError())  # type: ignore[arg-type]
    verify(tmp_path / "one")
    assert saving.writer.under_way is None


def test_start_that_crashes_while_it_is_set_up_has_nothing_to_wait_for(tmp_path: Path) -> None:
    saving = SaveCheckpoints(tmp_path, CheckpointConfig(), None)
    saving.on_exception(None, None, KeyError())  # type: ignore[arg-type]
    assert not saving.writer.failed


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_size_of_a_checkpoint_is_foreseen(tmp_path: Path, name: Literal["adamw", "muon"]) -> None:
    shape = {"image_size": 64, "width": 64, "depth": 2, "num_heads": 2, "decoder_width": 64, "decoder_depth": 1}
    model, config = mae.MaskedAutoencoder(mae.MAEConfig.model_validate(shape)), OptimConfig(name=name)
    optimizer = build_optimizer(model.named_parameters(), config, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    average = mae.Encoder(model.config)
    state = model.state_dict() | average.state_dict(prefix="average.")
    write_checkpoint({"state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "file")
    assert checkpoint_bytes(model, config, average) == pytest.approx((tmp_path / "file").stat().st_size, rel=0.05)
