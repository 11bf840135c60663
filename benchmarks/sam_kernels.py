"""Which kernel to pin for the attention of the SAM-style encoder: python -m benchmarks.sam_kernels [PART …]

tiles    "in place" with several sizes of its tiles
core     torch's kernels, on inputs that are ready: forward, and forward and backward
forward  the whole encoder as it is pinned, at several batches, and where its time goes
step     training steps, likewise

SAM-H at 1024 px, bfloat16, milliseconds; on a GPU alone.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_sam import random_encoder
from mae.sam.attention import relative_terms
from mae.sam.encoder import SIZES, Block
from mae.sam.kernels import augment, flex
from mae.sam.triton_attention import Tiles, attend_in_place
from mae.train.optim import OptimConfig, build_optimizer

CONFIG = SIZES["sam_huge"]
BATCH, REPEATS = 4, 20
WINDOWS = {"window": (14, 14), "global": (64, 64)}
TILES = {
    "window": [
        *(Tiles(64, 256, 4, 1), Tiles(64, 256, 8, 1), Tiles(128, 256, 8, 1), Tiles(64, 128, 4, 1), Tiles(64, 64, 4, 2)),
        *(Tiles(128, 128, 8, 1), Tiles(128, 64, 8, 2), Tiles(64, 0, 4, 3)),
    ],
    "global": [Tiles(128, 0, 8, 3), Tiles(128, 0, 8, 2), Tiles(128, 0, 8, 4), Tiles(64, 0, 4, 3), Tiles(128, 0, 4, 3)],
}
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def milliseconds(run: Callable[[], object]) -> float:
    """Returns the mean time of a call, by the GPU's clock."""
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS


def line(name: str, *runs: Callable[[], object]) -> None:
    """Prints the times of calls, or why there are none."""
    try:
        times = [milliseconds(run) for run in runs]
        print(f"  {name:46}", *(f"{value:8.3f} ms" for value in times), flush=True)
    except Exception as error:
        print(f"  {name:46} {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}", flush=True)


@torch.inference_mode()
def tiles() -> None:
    encoder = random_encoder(CONFIG, torch.device("cuda")).bfloat16()
    for name, block in (("window", encoder.blocks[0]), ("global", encoder.blocks[7])):
        assert isinstance(block, Block)
        attention = block.attn
        qkv = torch.randn(BATCH, 64, 64, 3 * CONFIG.width, device="cuda", dtype=torch.bfloat16)
        positions = attention.rel_pos_h, attention.rel_pos_w
        split = attention._split(qkv)
        line(f"{name}: cut out windows, add terms", lambda: attention._split(qkv))  # noqa: B023
        del split
        for sizes in TILES[name]:
            arguments = (qkv, attention.qkv.bias, *positions, WINDOWS[name], CONFIG.num_heads, sizes)
            line(f"{name}: in place, {tuple(sizes)}", lambda: attend_in_place(*arguments))  # noqa: B023


def core() -> None:
    width = CONFIG.width // CONFIG.num_heads
    for name, grid in WINDOWS.items():
        groups = BATCH * CONFIG.num_heads * (25 if name == "window" else 1)
        q, k, v = (torch.randn(groups, grid[0] * grid[1], width, device="cuda").bfloat16() for _ in range(3))
        of_rows, of_columns = (torch.randn(2 * side - 1, width, device="cuda").bfloat16() * 0.1 for side in grid)
        rows, columns = (x.contiguous() for x in relative_terms(q, of_rows, of_columns, grid))
        wide_q, wide_k = augment(q, k, rows, columns)
        wide_v = F.pad(v, (0, wide_q.shape[-1] - width))
        keys = q.shape[1]
        matrix = F.pad((rows[..., None] + columns[..., None, :]).flatten(2), (0, -keys % 8))[..., :keys]
        for kind, given, mask in (
            ("augmented", (wide_q, wide_k, v), None),
            ("padded", (wide_q, wide_k, wide_v), None),
            ("bias", (q, k, v), matrix),
        ):
            for backend in BACKENDS:
                time_core(f"{name}: {kind}, {backend.name}", given, lambda *x, m=mask, b=backend: fused(x, m, b))
        time_core(f"{name}: flex", (q, k, v, rows, columns), torch.compile(flex, dynamic=False))
        torch.cuda.empty_cache()


def fused(given: tuple[Tensor, ...], mask: Tensor | None, backend: SDPBackend) -> Tensor:
    q, k, v = (x[None] for x in given)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[None], scale=1.0)


def time_core(name: str, given: tuple[Tensor, ...], attend: Callable[..., Tensor]) -> None:
    """Prints the times of a forward pass, and of one with its backward pass."""
    leaves = tuple(x.detach().requires_grad_() for x in given)

    def forward() -> None:
        with torch.inference_mode():
            attend(*given)

    def both() -> None:
        torch.autograd.grad(attend(*leaves).float().sum(), leaves)

    line(f"{name}, forward", forward)
    line(f"{name}, forward and backward", both)


@torch.inference_mode()
def forward() -> None:
    encoder = random_encoder(CONFIG, torch.device("cuda")).bfloat16().eval()
    images = torch.randn(16, 3, 1024, 1024, device="cuda").bfloat16()
    for batch in (1, 8):
        report(f"eager, {batch} images", lambda: encoder(images[:batch]), batch)  # noqa: B023
    for batch in (1, 4, 8, 16):
        torch._dynamo.reset()
        for block in encoder.blocks:
            block.compile(dynamic=False)
        report(f"compiled, {batch} images", lambda: encoder(images[:batch]), batch, trace=batch == 8)  # noqa: B023


def step() -> None:
    encoder = random_encoder(CONFIG, torch.device("cuda"))
    optimizer = build_optimizer(encoder.named_parameters(), OptimConfig.model_validate({}), lr=1e-5)
    images = torch.randn(4, 3, 1024, 1024, device="cuda")

    def train(batch: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = encoder(images[:batch]).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    report("eager step, 2 images", lambda: train(2), 2)
    for block in encoder.blocks:
        block.compile(dynamic=False)
    report("compiled step, 4 images", lambda: train(4), 4, trace=True)


def report(name: str, run: Callable[[], object], batch: int, *, trace: bool = False) -> None:
    """Prints images per second and peak memory, and with `trace` the kernels that take the most time."""
    started = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    try:
        took = milliseconds(run)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"  {name:46} {took:8.2f} ms, {1000 * batch / took:6.1f} images/s, {peak:.1f} GiB "
            f"({time.perf_counter() - started:.0f} s with compilation)",
            flush=True,
        )
        if trace:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                run()
                torch.cuda.synchronize()
            total = sum(event.self_device_time_total for event in profiler.key_averages())
            events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
            for event in events[:22]:
                took = event.self_device_time_total
                print(f"    {took / total:5.1%} {took / 1000:8.2f} ms {event.count:5} x {event.key[:110]}")
    except Exception as error:
        print(f"  {name:46} {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}", flush=True)


if __name__ == "__main__":
    parts = {"tiles": tiles, "core": core, "forward": forward, "step": step}
    print(torch.cuda.get_device_name(), torch.__version__, torch.backends.cudnn.version())
    for part in sys.argv[1:] or parts:
        print(part, flush=True)
        started = time.perf_counter()
        try:
            parts[part]()
        except Exception as error:
            print(f"  {part} ended: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.empty_cache()
        print(f"  {part} took {time.perf_counter() - started:.0f} s", flush=True)
