"""A run of train.py whose loss is not finite at some steps: python -m tests.poisoned_run STEPS RANK LOG.jsonl ..."""

import hashlib
import json
import math
import sys

import lightning.pytorch as pl

from tests.logged_run import train_with


class Poison(pl.Callback):
    """Makes the first micro-batch of `steps` bad on one rank; notes a hash of what was learnt after every step.

    spread  whether the gradient is spoilt as well, or the value of the loss alone
    """

    def __init__(self, steps: range | set[int], rank: int = 0, spread: bool = True, path: str | None = None) -> None:
        self.steps = steps
        self.rank = rank
        self.spread = spread
        self.path = path
        self.learnt: list[str] = []
        self.batch_idx = 0

    def on_train_start(self, trainer, module) -> None:
        def spoil(model, inputs, out):
            bad = trainer.global_step in self.steps and trainer.global_rank == self.rank
            if not model.training or not bad or self.batch_idx % trainer.accumulate_grad_batches:
                return out
            return out._replace(loss=out.loss * math.nan if self.spread else out.loss + math.inf)

        module.model.register_forward_hook(spoil)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        digest = hashlib.sha256()
        for parameter, state in trainer.optimizers[0].state.items():
            for tensor in (parameter.detach(), *state.values()):
                digest.update(tensor.cpu().numpy().tobytes())
        self.learnt.append(digest.hexdigest())
        if self.path:
            with open(self.path, "ab", buffering=0) as file:
                file.write((json.dumps([trainer.global_rank, trainer.global_step, self.learnt[-1]]) + "\n").encode())


if __name__ == "__main__":
    steps, rank, path, *overrides = sys.argv[1:]
    train_with([Poison(set(json.loads(steps)), int(rank), path=path)], overrides)
