"""Keeps what is not finite out of the weights, and ends a run that brings forth nothing else."""

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

LIMIT = 10  # skipped steps in a row


class SkipNonFinite(StepCallback):
    """A step whose loss or gradient norm is not finite on any rank changes no parameter and no optimiser state on any.

    It counts as a step: position, schedule and order move on. LIMIT of them in a row end the run.

    The decision stays on the device, where fused AdamW reads it (`found_inf`); on a GPU the host learns of it one step
    later and waits for nothing. The signals that ranks have received travel along: one small all-reduce per step.
    """

    def __init__(self, run: Path, signals: StopOnSignal) -> None:
        self.run = run
        self.signals = signals
        self.counts = torch.zeros(2)  # steps skipped: in all, and in a row until now
        self.reports: deque[Report] = deque()

    @property
    def skipped(self) -> int:
        """Steps skipped since the beginning of the run. Waits for the device."""
        return int(self.counts[0])

    @property
    def state_key(self) -> str:
        return "Guard"  # the name in checkpoints, which was that of the class

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
            # One rank may have been the only one told; the highest number wins, so that all exit alike.
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        bad, signum = agreed
        if trainer.scaler is not None:  # of 16-mixed: it has its own `found_inf`, by the gradients alone
            gradients[0] += torch.where(bad.bool(), torch.nan, 0.0)
        optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
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
        if in_a_row >= LIMIT:
            saved = checkpoints(self.run)
            raise RunEnded(
                f"the loss or gradient of {in_a_row} steps in a row, {step - in_a_row + 1} to {step}, was not finite; "
                + (f"the last good checkpoint is {saved[0]}. " if saved else "there is no checkpoint yet. ")
                + "Lower optim.base_lr or set optim.grad_clip, and start anew with another name="
                + (" and init_from= that checkpoint" if saved else "")
            )


class Report:
    """A few small numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.arrival = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def read(self) -> list[int]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return [int(number) for number in self.numbers.tolist()]
