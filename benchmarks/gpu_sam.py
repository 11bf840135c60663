"""Rows of `benchmarks.gpu` for the SAM-style encoder at 1024 px, beside segment-anything, timm and transformers.

All have the same random weights. forward: weights and images converted to bfloat16 once. step: forward, backward and
AdamW under autocast, without activation checkpointing; the loss is the mean square of the embedding.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.sam_encoder import segment_anything, timm, transformers
from benchmarks.timed import Bench, Figures, Group, Row, Unavailable, allocated, median_seconds, peak_since
from mae.sam.encoder import SIZES, Block, SamConfig, SamEncoder
from mae.sam.flops import sam_flops
from mae.sam.kernels import IN_PLACE
from mae.train.optim import OptimConfig, build_optimizer

SMALL = SamConfig(image_size=(64, 64), width=32, depth=2, num_heads=2, window=2, global_blocks=(1,))
# Beside the pinned one, compiled.
FORWARD_KERNELS = (IN_PLACE, "padded", "flex", "bias")
STEP_KERNELS = ("padded", "flex", "bias")
FORWARD_BATCH, STEP_BATCH = 8, 2


def forward_rows(size: str, bench: Bench) -> Iterator[Row]:
    """Yields the forward passes of one size."""
    config, batch = (SMALL, 1) if bench.small else (SIZES[size], FORWARD_BATCH)
    ours = random_encoder(config, bench.device).eval()
    converted = deepcopy(ours).to(torch.bfloat16)
    run = partial(time_forward, bench, config)
    peers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "timm": lambda: timm(ours).to(torch.bfloat16).eval().forward_features,
        "segment-anything": lambda: segment_anything(ours).to(torch.bfloat16).eval(),
        "transformers": lambda: transformers(ours, torch.bfloat16, bench.device.type),
    }

    def time_peer(name: str) -> Figures:
        with bench.device:  # random weights are drawn there, which takes seconds on a CPU
            peer = peers[name]()
        return run(peer, batch)

    for name in peers:
        yield f"{name}, {batch} images", partial(time_peer, name)
    yield f"ours, {batch} images", lambda: run(converted, batch)
    yield f"ours under autocast, {batch} images", lambda: run(ours, batch, autocast=True)
    for images in dict.fromkeys((batch, 1)):
        yield f"ours compiled, {images} images", lambda n=images: run(converted, n, compiled=True)
    for kernel in FORWARD_KERNELS:
        name = f"ours compiled, {kernel}, {batch} images"
        yield name, lambda k=kernel: run(converted, batch, compiled=True, kernel=k)


def step_rows(size: str, bench: Bench) -> Iterator[Row]:
    """Yields the training steps of one size."""
    config, batch = (SMALL, 1) if bench.small else (SIZES[size], STEP_BATCH)
    ours = random_encoder(config, bench.device)
    run = partial(time_step, bench, config, batch)
    yield f"timm, {batch} images", lambda: run(timm(ours).to(bench.device), call="forward_features")
    yield f"segment-anything, {batch} images", lambda: run(segment_anything(ours).to(bench.device))
    yield f"ours, {batch} images", lambda: run(ours)
    yield f"ours compiled, {batch} images", lambda: run(ours, compiled=True)
    for kernel in STEP_KERNELS:
        yield f"ours compiled, {kernel}, {batch} images", lambda k=kernel: run(ours, compiled=True, kernel=k)


def random_encoder(config: SamConfig, device: torch.device) -> SamEncoder:
    """Returns an encoder with no weights at zero."""
    torch.manual_seed(0)
    with torch.no_grad(), device:
        encoder = SamEncoder(config)
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return encoder


def time_forward(
    bench: Bench,
    config: SamConfig,
    encoder: Callable[[Tensor], Tensor],
    batch: int,
    *,
    autocast: bool = False,
    compiled: bool = False,
    kernel: str | None = None,
) -> Figures:
    if isinstance(encoder, SamEncoder):
        prepare(bench, encoder, compiled=compiled, kernel=kernel)
    dtype = torch.float32 if autocast else torch.bfloat16
    images = torch.randn(batch, 3, *config.image_size, device=bench.device, dtype=dtype)
    before = allocated(bench)
    with torch.inference_mode(), torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
        seconds = median_seconds(lambda _: encoder(images), bench)
    return figures(bench, batch * sam_flops(config, pad=True), batch, seconds, before)


def time_step(
    bench: Bench,
    config: SamConfig,
    batch: int,
    encoder: nn.Module,
    *,
    call: str = "forward",
    compiled: bool = False,
    kernel: str | None = None,
) -> Figures:
    if isinstance(encoder, SamEncoder):
        prepare(bench, encoder, compiled=compiled, kernel=kernel)
    forward = getattr(encoder.train(), call)
    images = torch.randn(batch, 3, *config.image_size, device=bench.device)
    before = allocated(bench)
    optimizer = build_optimizer(encoder.named_parameters(), OptimConfig.model_validate({}), lr=1e-5)

    def step(_: int) -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = forward(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_seconds(step, bench)
    return figures(bench, 3 * batch * sam_flops(config, pad=True), batch, seconds, before)


def figures(bench: Bench, flops: int, batch: int, seconds: float, before: int) -> Figures:
    return Figures(batch / seconds, mfu=flops / seconds / bench.peak, memory=peak_since(bench, before))


def prepare(bench: Bench, encoder: SamEncoder, *, compiled: bool, kernel: str | None) -> None:
    """Sets the kernel of all blocks, and compiles them on a GPU or returns them to plain execution."""
    if not bench.on_gpu and kernel in (IN_PLACE, "flex"):
        raise Unavailable("needs a GPU")
    torch._dynamo.reset()
    for block in encoder.blocks:
        assert isinstance(block, Block)
        block.attn.kernel = kernel
        block._compiled_call_impl = None
    if compiled and bench.on_gpu:
        encoder.compile_blocks()


GROUPS: dict[str, Group] = {
    "sam_huge": partial(forward_rows, "sam_huge"),
    "sam_base": partial(forward_rows, "sam_base"),
    "sam_huge_step": partial(step_rows, "sam_huge"),
    "sam_base_step": partial(step_rows, "sam_base"),
}
