"""Rows of `benchmarks.gpu` for pre-training: steps beside transformers and lightly, updates, FSDP2, and the loader.

A step is forward, backward and update under autocast in bfloat16, from images that lie on the device. All models of a
size have the same weights, images and masks.
"""

import io
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

import mae
from benchmarks.step import Steps
from benchmarks.stream import images_per_second, make_images, ours
from benchmarks.timed import Bench, Figures, Group, Row, Unavailable, allocated, median_seconds, peak_since
from data.pack.image_folder import find_images
from data.pack.pack import pack
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.flops import pretraining_flops
from mae.models.noise import uniform_noise
from mae.models.pixels import Pixels
from mae.train.muon import update_flops
from mae.train.optim import OptimConfig, build_optimizer
from mae.train.strategies import shard

# Settings as transformers names them, and images per micro-batch.
Size = tuple[dict[str, Any], int]
SIZES: dict[str, Size] = {
    "vit_base": ({}, 256),
    "vit_large": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        256,
    ),
    "vit_huge14": (
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
        | {"patch_size": 14},
        128,
    ),
}
SMALL: Size = (
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    | {"image_size": 64, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    | {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 128},
    4,
)


def config_of(size: dict[str, Any]) -> mae.MAEConfig:
    """Returns the architecture that settings of transformers name; what they leave out is ViT-B/16's."""
    names = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    names |= {"patch_size": "patch_size", "image_size": "image_size", "decoder_hidden_size": "decoder_width"}
    names |= {"decoder_num_hidden_layers": "decoder_depth", "decoder_num_attention_heads": "decoder_num_heads"}
    return mae.MAEConfig.model_validate({names[name]: value for name, value in size.items() if name in names})


VIT_1B = mae.MAEConfig.model_validate({"width": 1536, "depth": 48, "num_heads": 24})
SMALL_1B = config_of(SMALL[0])
ADAMW = OptimConfig.model_validate({})


def size_rows(name: str, bench: Bench) -> Iterator[Row]:
    """Yields the steps of one size and its peers; lightly for the smallest alone."""
    size, batch = SMALL if bench.small else SIZES[name]
    steps = Steps(batch, bench.device, size, peers=("transformers",))
    yield f"transformers, {batch} images", lambda: time_step(bench, steps, "transformers")
    if name == "vit_base":
        yield f"lightly, {batch} images", lambda: time_step(bench, Steps(batch, bench.device, size), "lightly")
    yield f"ours, {batch} images", lambda: time_step(bench, steps, "ours")

    def compiled() -> Figures:
        model: Any = steps.models["ours"][0]
        prepare_blocks(model.whole_blocks, BlocksConfig(compile=bench.on_gpu))
        return time_step(bench, steps, "ours")

    yield f"ours compiled, {batch} images", compiled


def time_step(bench: Bench, steps: Steps, name: str) -> Figures:
    """Times one contender; its optimiser is dropped afterwards, with its state."""
    before = allocated(bench)
    seconds = median_seconds(lambda number: steps.time_step(name, number, bf16=True), bench)
    optimizer = steps.optimizers[name]
    optimizer.state.clear()
    return step_figures(bench, steps.config, len(steps.images), seconds, before)


def step_figures(bench: Bench, config: mae.MAEConfig, batch: int, seconds: float, before: int) -> Figures:
    flops = pretraining_flops(config) * batch
    return Figures(batch / seconds, mfu=flops / seconds / bench.peak, memory=peak_since(bench, before))


def billion_rows(bench: Bench) -> Iterator[Row]:
    """Yields the steps of a ViT of 1.36 billion parameters, which transformers does not publish."""
    config, batch = (SMALL_1B, 4) if bench.small else (VIT_1B, 64)
    for recompute, compiled in (("none", False), ("none", True), ("all", True)):
        settings = BlocksConfig(recompute=recompute, compile=compiled and bench.on_gpu)
        words = ["ours", *["compiled"] * compiled, *["recomputed"] * (recompute == "all")]
        yield f"{' '.join(words)}, {batch} images", lambda s=settings: time_model(bench, config, batch, s)


def time_model(bench: Bench, config: mae.MAEConfig, batch: int, settings: BlocksConfig, fsdp: bool = False) -> Figures:
    """Times steps of a model of random weights, as a program of one's own makes them."""
    with bench.device:
        model = mae.MaskedAutoencoder(config).train()
        images, rows = torch.randn(batch, 3, *config.image_size), torch.arange(batch)
    before = allocated(bench)
    prepare_blocks(model.whole_blocks, settings)  # pyright: ignore[reportArgumentType]
    if fsdp:
        mesh = init_device_mesh(bench.device.type, (1,))
        shard(model, model.whole_blocks, mesh, ("encode", "reconstruct"))  # pyright: ignore[reportArgumentType]
    step = training_step(bench, model)
    seconds = median_seconds(lambda number: step(images, rows, number), bench)
    return step_figures(bench, config, batch, seconds, before)


def training_step(bench: Bench, model: mae.MaskedAutoencoder) -> Any:
    """Returns a function of images, their rows of the global batch, and the step, which makes the step."""
    optimizer = build_optimizer(model.named_parameters(), ADAMW, 1e-4)

    def step(images: torch.Tensor, rows: torch.Tensor, number: int) -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = model(images, uniform_noise(0, number, rows, model.config.patches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp_rows(bench: Bench) -> Iterator[Row]:
    """Yields the same steps with and without FSDP2, on one device."""
    config = SMALL_1B if bench.small else config_of(SIZES["vit_large"][0])
    batch = 4 if bench.small else 256
    plain = BlocksConfig()

    def sharded() -> Figures:
        backend = "nccl" if bench.on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            return time_model(bench, config, batch, plain, fsdp=True)
        finally:
            dist.destroy_process_group()

    yield f"ViT-L/16, {batch} images", lambda: time_model(bench, config, batch, plain)
    yield f"ViT-L/16 under FSDP2, {batch} images", sharded


def update_rows(bench: Bench) -> Iterator[Row]:
    """Yields the updates of one device by each kind of optimiser."""
    for name, (size, _) in {"small": SMALL}.items() if bench.small else SIZES.items():
        for kind in ("adamw", "muon"):
            yield f"{name}, {kind}", partial(time_update, bench, size, kind)


def time_update(bench: Bench, size: dict[str, Any], kind: str) -> Figures:
    config = config_of(size)
    with bench.device:
        model = mae.MaskedAutoencoder(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(model.named_parameters(), OptimConfig.model_validate({"name": kind}), 1e-4)
    before = allocated(bench)
    seconds = median_seconds(lambda _: optimizer.step(), bench)
    share = update_flops(model.named_parameters()) / seconds / bench.peak if kind == "muon" else None
    return Figures(1000 * seconds, "ms", share, peak_since(bench, before))


def loader_rows(bench: Bench) -> Iterator[Row]:
    """Yields the loader alone, ViT-B/16 fed by it, and nvJPEG's decoding of whole images."""
    copies, seconds = (128, 1.0) if bench.small else (4000, 12.0)
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        if bench.photos is None:
            write_pictures(out / "pictures")
        make_images(bench.photos or out / "pictures", out, (500, 375), copies)
        samples, classes, *_ = find_images(out / "images")
        pack(samples, out / "shards", name="x", classes=classes, shard_size=copies // 4)
        kind = "photographs" if bench.photos else "made pictures"
        yield (
            f"{kind} of 500x375, {workers} workers",
            lambda: Figures(images_per_second(ours(out, workers, batch=batch_size(bench)), seconds)),
        )
        yield f"a training step fed by {workers} workers", lambda: time_fed(bench, out, workers, seconds)
        yield "nvJPEG, whole images", lambda: time_nvjpeg(bench, out / "images" / "0", min(copies, 512))


def batch_size(bench: Bench) -> int:
    return 16 if bench.small else 256


def time_fed(bench: Bench, out: Path, workers: int, seconds: float) -> Figures:
    """Times ViT-B/16, compiled on a GPU, from bytes of JPEGs to the update."""
    config = SMALL_1B.model_copy(update={"image_size": (224, 224)}) if bench.small else config_of({})
    with bench.device:
        model = mae.MaskedAutoencoder(config).train()
        pixels = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    prepare_blocks(model.whole_blocks, BlocksConfig(compile=bench.on_gpu))  # pyright: ignore[reportArgumentType]
    step, rows = training_step(bench, model), torch.arange(batch_size(bench), device=bench.device)
    images, started = 0, 0.0
    before = allocated(bench)
    for number, batch in enumerate(chain.from_iterable(repeat(ours(out, workers, batch=len(rows))))):
        if number == 5:
            started = time.perf_counter()
        step(pixels.normalise(batch["images"].to(bench.device, non_blocking=True)), rows, number)
        if bench.on_gpu:
            torch.cuda.synchronize()  # the shared batch is written again as soon as nobody holds it
        if number >= 5:
            images += len(rows)
            if time.perf_counter() - started > seconds:
                break
    return step_figures(bench, config, images, time.perf_counter() - started, before)


def time_nvjpeg(bench: Bench, folder: Path, count: int) -> Figures:
    if not bench.on_gpu:
        raise Unavailable("needs a GPU")
    from torchvision.io import decode_jpeg, read_file

    files = [read_file(str(path)) for path in sorted(folder.iterdir())[:count]]
    return Figures(count / median_seconds(lambda _: decode_jpeg(files, device="cuda"), bench))


def write_pictures(folder: Path) -> None:
    """Writes JPEGs of smooth colours and grain, where there are no photographs."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(8):
        smooth = Image.fromarray(noise.integers(0, 256, (12, 16, 3), np.uint8)).resize((1200, 900))
        grain = noise.normal(0, 12, (900, 1200, 1))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())


GROUPS: dict[str, Group] = {
    **{name: partial(size_rows, name) for name in SIZES},
    "vit_1b": billion_rows,
    "update": update_rows,
    "fsdp": fsdp_rows,
    "loader": loader_rows,
}
