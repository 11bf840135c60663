"""Skips updates whose loss or gradient is not finite; ends the run after SKIPS_IN_A_ROW of them."""

from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae.callbacks.step_callback import StepCallback
from mae.callbacks.stop_on_signal import StopOnSignal
from mae.distributed.rank_zero import say
from mae.errors import RunEnded
from mae.run.checkpoint_files import checkpoints

SKIPS_IN_A_ROW = 10


class SkipNonFinite(StepCallback):
    """Skips the update on all ranks if the loss or the gradient norm of any rank is not finite.

    A skipped step changes no parameter, average or optimiser state, and still counts: position and schedule advance.

    The decision stays on the device, where fused AdamW reads it (`found_inf`). The host reads a GPU's decision one step
    later, so that it never waits. The same all-reduce makes the ranks agree on the signals that they received.
    """

    def __init__(self, run: Path, signals: StopOnSignal) -> None:
        self.run = run
        self.signals = signals
        self.counts = torch.zeros(2)  # steps skipped: in all, and in a row until now
        self.reports: deque[Report] = deque()

    @property
    def skipped(self) -> int:
        """Number of steps skipped since the beginning of the run. Waits for the device."""
        return int(self.counts[0])

    @property
    def state_key(self) -> str:
        return "Guard"  # an earlier name of the class, under which checkpoints hold the counts

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = torch.tensor(state_dict["counts"])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert all(optimizer.defaults["fused"] for optimizer in trainer.optimizers), "nobody would read found_inf"
        self.counts = self.counts.to(module.device)
        self.loss = torch.zeros((), device=module.device)
        self.delay = 0 if module.device.type == "cpu" else 1

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        self.loss += loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        bad = (~torch.isfinite(norm + self.loss)).float()
        self.loss.zero_()
        agreed = torch.stack([bad, torch.full_like(bad, self.signals.received)])
        if trainer.world_size > 1:
            # A signal may have reached one rank only. The highest number wins, so that all exit alike.
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        bad, signum = agreed
        if trainer.scaler is not None:
            # GradScaler (16-mixed) checks gradients only, so a loss that is not finite must reach it as a NaN gradient.
            gradients[0] += torch.where(bad.bool(), torch.nan, 0.0)
        optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        module.found_inf = bad  # GradScaler replaces the optimiser's and removes it after the step
        skipped, in_a_row = self.counts
        self.counts = torch.stack([skipped + bad, (in_a_row + 1) * bad])
        self.reports.append(Report(torch.stack([self.counts[1], signum])))

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if len(self.reports) <= self.delay:
            return
        in_a_row, self.signals.agreed = self.reports.popleft().read()
        step = trainer.global_step - self.delay
        if in_a_row == 1:
            say(f"step {step} skipped: its loss or gradient is not finite")
        if in_a_row >= SKIPS_IN_A_ROW:
            saved = checkpoints(self.run)
            raise RunEnded(
                f"the loss or gradient of {in_a_row} steps in a row, {step - in_a_row + 1} to {step}, was not finite; "
                + (f"the last good checkpoint is {saved[0]}. " if saved else "there is no checkpoint yet. ")
                + "Lower optim.base_lr or set optim.grad_clip, and start a new run with another name="
                + (" and init_from= that checkpoint" if saved else "")
            )


class Report:
    """Copy of a few numbers from the device to the host, without waiting for it."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.arrival = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def read(self) -> list[int]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return [int(number) for number in self.numbers.tolist()]
