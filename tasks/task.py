"""Task: the parts of a run that depend on the kind of training; tasks/train.py puts them together.

A new task is a file here with a subclass of Task and a line in TASKS, and conf/task/NAME.yaml with its values.
"""

import shlex
import sys
from abc import ABC, abstractmethod
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Generic

import lightning.pytorch as pl
from omegaconf import DictConfig
from torch import nn

from data.datamodule import ShardDataModule
from mae.distributed.launch import Topology
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.pixels import Pixels
from mae.report.loss_curve import draw_loss_curve
from mae.report.summary import interpreter, say_closing, summarise
from mae.train.average import AverageConfig, begin_average, describe_average
from mae.train.schedule import Schedule, derive_schedule, split_batch
from mae.train.training import Training
from tasks.config import TaskSettings, TrainConfig, plain_settings, validate
from tasks.words import choose_one, setting

TASKS = {"pretrain": "Pretrain", "finetune": "Finetune", "distill": "Distill", "segment": "Segment"}  # tasks/NAME.py
PIXELS = {"scale", "flip", "rand_augment", "decode", "bits", "mean", "std"}  # settings of `data` that a recipe holds


class Task(ABC, Generic[TaskSettings]):
    """One run's data, schedule, model and Lightning module, made when they are asked for.

    settings_type  the model of its settings
    training       its Lightning module
    loss           what the loss curve shows
    of_average     what task.ema averages
    """

    settings_type: ClassVar[type[AverageConfig]]
    training: ClassVar[type[Training]]
    loss: ClassVar[str]
    of_average: ClassVar[str] = "all weights"

    def __init__(self, config: TrainConfig[TaskSettings], topology: Topology) -> None:
        self.config = config
        self.settings = config.task
        self.topology = topology

    @property
    def architecture(self) -> MAEConfig:
        """Returns the architecture of the encoder, and the size of its images."""
        return self.config.model

    @property
    def image_size(self) -> tuple[int, int]:
        """Returns height and width of the images that the model is trained on."""
        return self.architecture.image_size

    @property
    def unit(self) -> int:
        """Returns the number of images that share a micro-batch: the views of an image."""
        return self.config.data.views_per_image

    @cached_property
    def batch_split(self) -> tuple[int, int]:
        """Returns (micro_batch, accumulate). Raises ConfigError if the global batch cannot be split over the ranks."""
        return split_batch(self.config.global_batch, self.config.micro_batch, self.topology.ranks, self.unit)

    @property
    def data_arguments(self) -> dict[str, Any]:
        """Returns the arguments that every data module takes."""
        config = self.config
        return {
            "config": config.data,
            "seed": config.seed,
            "global_batch": config.global_batch,
            "micro_batch": self.batch_split[0],
            "unit": self.unit,
            "bad_samples": config.run / "bad_samples.jsonl",
        }

    @cached_property
    def data(self) -> ShardDataModule:
        shape = self.architecture
        return ShardDataModule(image_size=shape.image_size, channels=shape.in_channels, **self.data_arguments)

    @cached_property
    def schedule(self) -> Schedule:
        """Derives steps, accumulation and learning rate from the number of training images in an epoch."""
        schedule = self.schedule_over(len(self.data.order))
        assert schedule.steps_per_pass == self.data.steps_per_epoch, "data/ and mae/ count an epoch differently"
        return schedule

    def schedule_over(self, samples: int) -> Schedule:
        """Derives the schedule for so many training images. Raises ConfigError if there is none."""
        config = self.config
        return derive_schedule(
            config.optim,
            samples=samples,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            ranks=self.topology.ranks,
            epochs=config.epochs,
            max_steps=config.max_steps,
            views=config.data.views_per_image,
            unit=self.unit,
            branch_step=config.branched[1] if config.branched else None,
        )

    def recipe(self, precision: str) -> dict[str, Any]:
        """Returns the settings that decide the result: every checkpoint stores them, and a resume needs the same."""
        config = self.config
        return {
            "seed": config.seed,
            "global_batch": config.global_batch,
            "precision": precision,
            "model": self.architecture.model_dump(mode="json"),
            "optim": config.optim.model_dump(mode="json"),
            "data": config.data.model_dump(mode="json", include=PIXELS),
            "order": self.data.identity,
        }

    def refuse_settings(self, checkpoint: Path | None) -> None:
        """Raises ConfigError if settings do not go together, or are of no use in this task."""
        if self.config.online_probe.every is not None:
            raise ConfigError(
                f"online_probe.every={self.config.online_probe.every} is for task=pretrain and distill: set it to "
                "null. What is validated here is set by val_every"
            )

    @abstractmethod
    def model(self, checkpoint: Path | None) -> nn.Module:
        """Builds the model, with the weights of `config.init_from` on a fresh start (`checkpoint` is None)."""

    @abstractmethod
    def averaged(self, model: Any) -> nn.Module:
        """Builds a model of what is averaged: all of `model` or a part, under the same names, of any weights."""

    def average(self, model: nn.Module) -> nn.Module | None:
        """Builds the average of the weights as it is before the first step; None without task.ema."""
        return None if self.settings.ema is None else begin_average(self.averaged(model), model)

    def module(self, model: nn.Module, recipe: dict[str, Any], average: nn.Module | None = None) -> Training:
        """Builds the Lightning module."""
        config = self.config
        return self.training(
            model,
            config.optim,
            self.schedule,
            seed=config.seed,
            pixels=Pixels(config.data.mean, config.data.std),
            recipe=recipe,
            average=average,
            ema=self.settings.ema,
            **self.module_arguments(model, recipe),
        )

    def module_arguments(self, model: Any, recipe: dict[str, Any]) -> dict[str, Any]:
        """Returns further arguments of this task's Lightning module."""
        return {}

    @abstractmethod
    def describe(self, model: Any) -> dict[str, str]:
        """Returns the rows of the start table about the model."""

    def describe_average(self) -> dict[str, str]:
        """Returns the row of the start table about task.ema, none without."""
        ema = self.settings.ema
        return {} if ema is None else {f"average of {self.of_average}": describe_average(ema, self.config.global_batch)}

    def callbacks(self) -> list[pl.Callback]:
        """Builds this task's own callbacks, which run after a step is measured and before it is saved."""
        return []

    def finish(self, module: Training, step: int) -> None:
        """Draws the loss curve, writes summary.json and prints the closing lines. Called on rank 0 after `step`."""
        run, results = self.config.run, self.results(module, step)
        curve = draw_loss_curve(run, results.get("floors", {}), self.loss)
        branch = {"branch": self.config.branch} if self.config.branch is not None else {}
        summary = summarise(run, self.schedule, step, {**branch, **results, "loss_curve": str(curve)})
        if step < self.schedule.total_steps:
            print(
                f"trainer.max_time={self.config.trainer.max_time} is over after step {step} of "
                f"{self.schedule.total_steps}, checkpoint saved: the same command resumes"
            )
        say_closing(summary, [Path(summary.get("reconstruction", "")), curve], self.next_steps())

    @property
    def probe(self) -> str | None:
        """Returns the probe of eval.py that fits this run and its data, None if there is none."""
        return None

    def next_steps(self) -> dict[str, str]:
        """Returns label -> command, or line of Python, for what to do with the run: only what works for it."""
        run, python = shlex.quote(str(self.config.run)), interpreter()
        steps = {"report": f"{python} -m mae.report {run}"}
        # eval.py opens the images anew, by their numbers: a stream has none.
        if self.config.data.mode == "index" and self.probe is not None:
            program = Path(sys.argv[0]).with_name("eval.py")
            words = [str(program) if program.is_file() else "eval.py", setting("checkpoint", str(self.config.run))]
            steps["evaluate"] = f"{python} {shlex.join(words)} probe={self.probe}"
        return steps

    def use_encoder(self) -> dict[str, str]:
        """Returns the next steps with an encoder: demo, export, mae.load."""
        demo = self.show_demo() if self.architecture.in_channels in (1, 3) else {}
        return demo | {
            "export": self.export_command("timm", "encoder.safetensors"),
            "Python": f"mae.load({str(self.config.run)!r})",
        }

    def show_demo(self) -> dict[str, str]:
        """Returns the command of the demo page, nothing where gradio is not installed."""
        command = f"{interpreter()} -m mae.demo {shlex.quote(str(self.config.run))}"
        return {"demo": command} if find_spec("gradio") is not None else {}

    def export_command(self, to: str, name: str) -> str:
        """Returns the command that writes the weights in another format into the run folder."""
        run, out = self.config.run, self.config.run / "export" / name
        replace = " --overwrite" if out.exists() else ""
        return f"{interpreter()} -m mae.export {shlex.join([str(run), '--to', to, '--out', str(out)])}{replace}"

    def results(self, module: Any, step: int) -> dict[str, Any]:
        """Computes further entries of summary.json after `step`; "floors" are drawn into the loss curve."""
        return {}


def task_class(name: str | None) -> type[Task]:
    """Returns the class of a task. Imports its file only now: pre-training loads nothing of fine-tuning and SAM.

    Raises ConfigError for an unknown name.
    """
    if name not in TASKS:
        raise ConfigError(f"task.name={name} is none of {', '.join(TASKS)}: leave it to task=, as in task=pretrain")
    return getattr(import_module(f"tasks.{name}"), TASKS[name])


def read_settings(raw: DictConfig, recipe: str | None = None) -> TrainConfig:
    """Validates the settings of a training run, begun with a recipe. Raises ConfigError or ValidationError."""
    settings = plain_settings(raw)
    if settings.get("task") is None:
        reason = choose_one("task")
        raise ConfigError(reason)
    task = task_class(settings["task"].get("name"))
    return validate(TrainConfig[task.settings_type], {"recipe": recipe} | settings)
