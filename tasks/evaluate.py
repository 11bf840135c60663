"""One evaluation: from the settings of eval.py to tables, JSON and pictures.

1 launch    validate EvalConfig; join the ranks of torchrun or SLURM
2 open      the checkpoint, the same model untrained, the images
3 collect   what the probes want of both models, on all ranks, kept in the feature cache
4 measure   rank 0: each probe
5 report    PROBE.json, suite.json, table, summary of the W&B run
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from data.datamodule import ShardDataModule
from data.errors import DataError
from data.evaluation import EvaluationImages, left_out_sentence
from mae.distributed.launch import Topology
from mae.distributed.ranks import join_process_group
from mae.errors import ConfigError
from mae.formats.load import load
from mae.formats.opened import Opened, open_weights
from mae.models.classifier import Classifier, Pool
from mae.models.config import MAEConfig
from mae.models.pixels import Pixels
from mae.probes.attentive import Attentive
from mae.probes.classify import Classify
from mae.probes.dense import Dense
from mae.probes.embeddings import Embeddings
from mae.probes.feature_cache import FeatureCache
from mae.probes.knn import KNN
from mae.probes.linear import Linear
from mae.probes.losses import Losses
from mae.probes.models_under_probe import Model, ModelsUnderProbe, Want
from mae.probes.neighbours import Neighbours
from mae.probes.probe import Outcome
from mae.probes.reconstruct import Reconstruct
from mae.probes.score_figures import draw_suite
from mae.probes.suite import Suite, require_fit, select_probes
from mae.run.checkpoint_files import Weights
from mae.run.folder import write_json
from mae.run.of_weights import evaluation_folder
from mae.run.tracker_identity import reopen_wandb, tracked_run
from tasks.config import plain_settings, validate
from tasks.embed import write_embeddings
from tasks.errors import readable_errors
from tasks.evaluation_folder import choose_folder, read_data_settings, record_data, same_run
from tasks.losses import write_losses
from tasks.relevance_eval import RelevanceProbe, evaluate_relevance
from tasks.segment_eval import SegmentProbe, evaluate_segmentation

AnyProbe = (
    KNN
    | Linear
    | Attentive
    | Reconstruct
    | Classify
    | Neighbours
    | Dense
    | Suite
    | SegmentProbe
    | RelevanceProbe
    | Embeddings
    | Losses
)


class EvalConfig(BaseModel, frozen=True, extra="forbid"):
    """All settings of an evaluation; conf/eval.yaml holds their values."""

    checkpoint: Path
    weights: Weights | None = None
    probe: AnyProbe = Field(discriminator="name")
    model: dict[str, Any] = {}
    data: dict[str, Any]
    pool: Pool
    batch_size: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    cache_gb: float = Field(ge=0)
    out: Path | None
    wandb: bool


@readable_errors()
def launch(raw: DictConfig) -> None:
    """Validates the settings, joins the ranks of torchrun or SLURM and calls `evaluate`."""
    config = validate(EvalConfig, plain_settings(raw))
    topology = Topology.from_environment() or Topology()
    with join_process_group(topology):
        evaluate(config, topology)


def evaluate(config: EvalConfig, topology: Topology) -> None:
    """Measures the probes on a checkpoint and on the same model untrained.

    Raises ConfigError if none fits, CheckpointError if the run is overwritten meanwhile: its results would stand in the
    folder of another.
    """
    with same_run(config.checkpoint) as check:
        _evaluate(config, topology, check)


def _evaluate(config: EvalConfig, topology: Topology, check: Callable[[], None]) -> None:
    if config.wandb and config.out is not None:
        raise ConfigError("wandb=true takes the numbers from eval/ of the run: leave out= away")
    run = tracked_run(config.checkpoint) if config.wandb else None
    if isinstance(config.probe, SegmentProbe | RelevanceProbe):
        if topology.rank == 0:
            evaluate_sam(config, check)
            track(run)
        return
    if isinstance(config.probe, Embeddings | Losses):
        if config.wandb:
            raise ConfigError(f"wandb=true sends results, and probe={config.probe.name} measures nothing. Leave it out")
        opened, model = open_trained(config)
        place = {"out": config.out, "batch": config.batch_size, "topology": topology, "device": choose_device(topology)}
        if isinstance(config.probe, Losses):
            write_losses(config.probe, config.checkpoint, opened, model, config.data, **place, check=check)
        else:
            write_embeddings(config.probe, config.checkpoint, opened, model, config.data, **place)
        return
    probed, opened, results, about = open_models(config, topology)
    probes, left_out = select_probes(config.probe, probed)
    wants = [want for probe in probes for want in probe.wants(probed)]
    probed.collect(wants)
    for probe in probes:
        probe.extract(probed)
    if topology.rank != 0:
        return
    say_unreadable(probed, wants)
    check()
    results.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for probe in probes:
        try:
            require_fit(probe, probed)  # without what cannot be read
            outcome = probe.measure(probed, results)
        except (ConfigError, DataError) as error:
            if len(probes) == 1:
                raise
            left_out[probe.name] = f"failed: {error}"
            continue
        check()
        contents = {
            "probe": outcome.name,
            "checkpoint": str(config.checkpoint),
            "weights": opened.taken,
            **outcome.numbers,
            "remarks": list(outcome.remarks),
            "pictures": [str(path) for path in outcome.pictures],
            "unreadable": probed.unreadable_keys(probe.wants(probed)),
            "settings": probe.model_dump(mode="json") | {"pool": config.pool, "seed": config.seed},
            "data": about,
        }
        write_json(results / f"{outcome.name}.json", contents)
        outcomes.append(outcome)
    if isinstance(config.probe, Suite):
        summarise(config, opened, outcomes, left_out, results)
    report(config, opened, outcomes, left_out, results)
    if any("classes" in outcome.numbers and "top1" in outcome.numbers.get("trained", {}) for outcome in outcomes):
        for remark in probed.images.remarks_on_labels():
            print(f"labels: {remark}")
    track(run)


def say_unreadable(probed: ModelsUnderProbe, wants: list[Want]) -> None:
    """Says which images of these wants are left out."""
    for split, keys in probed.unreadable_keys(wants).items():
        if keys:
            reason = probed.images.explain_unreadable(split, int(probed.unreadable[split][0]))
            print(left_out_sentence(split, keys, len(probed.asked(split, wants)), reason))


def evaluate_sam(config: EvalConfig, check: Callable[[], None]) -> None:
    """Runs probe=segment or probe=relevance, which open what they need themselves."""
    if given := [name for name, value in config.model.items() if value is not None]:
        raise ConfigError(
            f"model.{given[0]}={config.model[given[0]]} is for masked autoencoders, and probe={config.probe.name} "
            "opens a SAM, whose file says all settings: leave it out"
        )
    if isinstance(config.probe, SegmentProbe):
        evaluate_segmentation(
            config.probe, config.checkpoint, config.data, config.seed, config.out, config.wandb, check, config.weights
        )
    elif isinstance(config.probe, RelevanceProbe):
        evaluate_relevance(
            config.probe, config.checkpoint, config.data, config.out, config.wandb, check, config.weights
        )


def track(run: Path | None) -> None:
    """Copies the results in eval/ to the summary of the W&B run. Does nothing if `run` is None."""
    if run is not None:
        with reopen_wandb(run):
            pass


def open_models(config: EvalConfig, topology: Topology) -> tuple[ModelsUnderProbe, Opened, Path, dict[str, Any]]:
    """Opens the models and images on this rank's device. Returns the weights, the folder of the results and their data.

    Raises ConfigError if the model has no class token to pool, or `model.*` says what the checkpoint says otherwise.
    """
    opened, trained = open_trained(config)
    if config.pool == "class_token" and not trained.config.class_tokens:
        raise ConfigError(f"pool=class_token, but {config.checkpoint} has no class token. Use pool=patches")
    torch.manual_seed(config.seed)  # for the weights of the untrained model
    if isinstance(trained, Classifier):
        untrained = Classifier(trained.config, trained.classes, trained.pool)
    else:
        untrained = type(trained)(trained.config)
    models: dict[str, Model] = {"trained": trained, "untrained": untrained}
    data = ShardDataModule(
        read_data_settings(config.checkpoint, opened, trained.config.in_channels, config.data),
        image_size=trained.config.image_size,
        channels=trained.config.in_channels,
        seed=0,
        global_batch=1,
        micro_batch=config.batch_size,
    )
    results = choose_folder(config.checkpoint, opened, data, out=config.out, wandb=config.wandb)
    probed = ModelsUnderProbe(
        models,
        EvaluationImages(data, config.batch_size, topology.rank, topology.ranks),
        Pixels(data.config.mean, data.config.std),
        FeatureCache((config.out or evaluation_folder(config.checkpoint)) / "features", config.cache_gb * 1e9),
        pool=config.pool,
        seed=config.seed,
        device=choose_device(topology),
    )
    return probed, opened, results, record_data(data)


def open_trained(config: EvalConfig) -> tuple[Opened, Model]:
    """Opens the checkpoint and loads its model."""
    opened = open_weights(config.checkpoint, weights=config.weights)
    # A copy: what is loaded from an opened file stays in it, and somebody may write to it.
    return opened, copy.deepcopy(load(opened, **given_model(config, opened)))


def choose_device(topology: Topology) -> torch.device:
    """Returns this rank's GPU, which becomes the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", topology.rank % topology.devices)
    torch.cuda.set_device(device)
    return device


def given_model(config: EvalConfig, opened: Opened) -> dict[str, Any]:
    """Returns the given fields of MAEConfig. Raises ConfigError if a checkpoint of a run says one of them otherwise."""
    given = {name: value for name, value in config.model.items() if value is not None}
    if opened.run is not None:
        said = opened.run["recipe"]["model"]
        own, wanted = (MAEConfig.model_validate(fields) for fields in (said, said | given))
        if differing := [name for name in given if getattr(own, name) != getattr(wanted, name)]:
            name = differing[0]
            raise ConfigError(
                f"model.{name}={given[name]}, but {opened.path} was trained with {getattr(own, name)}: model.* is for "
                "weights that do not say it. Leave it out"
            )
    return given


def titled(config: EvalConfig, opened: Opened) -> str:
    """Returns what was evaluated, and which of its weights if it holds two."""
    return f"{config.checkpoint}, {opened.taken} weights" if opened.taken else str(config.checkpoint)


def summarise(
    config: EvalConfig, opened: Opened, outcomes: list[Outcome], left_out: dict[str, str], results: Path
) -> None:
    """Writes suite.json and suite.png."""
    numbers = {outcome.name: outcome.numbers for outcome in outcomes}
    contents = {
        "checkpoint": str(config.checkpoint),
        "weights": opened.taken,
        "probes": numbers,
        "left_out": left_out,
        "seed": config.seed,
    }
    write_json(results / "suite.json", contents)
    both = ("trained", "untrained")
    accuracies = {
        name: {model: found[model]["top1"] for model in both}
        for name, found in numbers.items()
        if "top1" in found["trained"]
    }
    reconstructed = numbers.get("reconstruct", {"floors": {}})
    losses = {model: reconstructed[model]["loss"] for model in both if model in reconstructed}
    draw_suite(accuracies, losses, reconstructed["floors"], titled(config, opened), results / "suite.png")


def report(
    config: EvalConfig, opened: Opened, outcomes: list[Outcome], left_out: dict[str, str], results: Path
) -> None:
    """Prints the table and the names of the files."""
    table = Table(title=f"{titled(config, opened)}, seed {config.seed}", title_justify="left")
    table.add_column("probe")
    table.add_column("trained", justify="right")
    table.add_column("untrained", justify="right")
    table.add_column("trivial predictors")
    for outcome in outcomes:
        for row in outcome.rows:
            table.add_row(*row)
    Console().print(table)
    for remark in (remark for outcome in outcomes for remark in outcome.remarks):
        print(remark)
    for name, reason in left_out.items():
        print(f"left out: {name} {reason}")
    print(f"{results}: {', '.join(sorted(path.name for path in results.iterdir()))}")
