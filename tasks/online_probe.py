"""The online probe of a run: which images, labels and maps it measures."""

from collections.abc import Iterator
from functools import partial

from data.datamodule import ShardDataModule
from data.errors import DataError
from data.evaluation import EvaluationImages
from data.label_maps import Photograph
from mae.callbacks.online_dense import OnlineDense
from mae.callbacks.online_probe import OnlineProbe
from mae.distributed.launch import Topology
from mae.distributed.rank_zero import say
from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.probes.dense_targets import UNKNOWN
from mae.probes.dense_tokens import View
from tasks.config import OnlineProbeConfig


def build_online_probe(
    config: OnlineProbeConfig, every: int, data: ShardDataModule, model: MAEConfig, topology: Topology
) -> OnlineProbe:
    """Builds the online probe on test images, else training images; with kNN if all of them have labels.

    Raises ConfigError or DataError if the images cannot be measured as the settings say.
    """
    images = EvaluationImages(data, data.micro_batch, topology.rank, topology.ranks)
    streamed = data.config.mode == "stream"
    if streamed and data.val_index is None:
        raise ConfigError(
            f"online_probe.every={every} needs images that have numbers, and a stream has none: set "
            "data.val_path, or online_probe.every=null"
        )
    test = "train" if data.val_index is None else "test"
    held_out = images.samples(test, config.test_images)
    train = None
    if test == "test" and not streamed and bool((images.labels("test", held_out) >= 0).all()):
        samples = images.samples("train", config.train_images)
        if bool((images.labels("train", samples) >= 0).all()):
            if differing := images.differing_classes("train", "test"):
                raise DataError(f"online_probe.every={every}: {differing} Or set online_probe.every=null.")
            train = images.batches("train", samples)
            for remark in images.remarks_on_labels():
                say(f"labels: {remark}")
    if train is None:
        say("online probe: knn/top1 is left out, it needs labels of all training and validation images")
    dense = None if config.dense_images is None else _build_dense(config, config.dense_images, images, model, streamed)
    return OnlineProbe(every, config.k, train, images.batches(test, held_out), dense)


def _build_dense(
    config: OnlineProbeConfig, count: int, images: EvaluationImages, model: MAEConfig, streamed: bool
) -> OnlineDense:
    missing = images.lacks_maps("classes")
    if streamed or not images.has("test"):
        missing = "a stream has no photographs with numbers" if streamed else "there are no validation images"
    if missing:
        raise ConfigError(f"online_probe.dense_images={count}: {missing}. Or set online_probe.dense_images=null")
    names, void = images.naming("train")
    view = View(min(model.image_size), model.image_size, (-1,), model.patch_size)

    def photographs(split: str) -> Iterator[Photograph | None]:
        return images.photographs(split, images.samples(split, count), "classes", view.shown)

    train, test = partial(photographs, "train"), partial(photographs, "test")
    return OnlineDense(train, test, names, UNKNOWN if void is None else void, view, config.k)
