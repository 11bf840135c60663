"""Time and peak memory of a training step of SAM at 1024 x 1024, beside the forecast of plan=true.

python -m benchmarks.segment_step base|huge [--masks N] [--clicks N] [--steps N]
"""

import argparse
import resource
import time

import torch

from mae.models.config import MAEConfig
from mae.plan.devices import peak_memory
from mae.plan.training_cost import segmentation_cost
from mae.sam.config import SegmentConfig
from mae.sam.encoder import SIZES, SamEncoder
from mae.sam.segmenter import STRIDE, Segmenter
from mae.sam.session import draw_session, simulate_session
from mae.train.optim import OptimConfig, build_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("size", choices=["base", "large", "huge"])
    parser.add_argument("--masks", type=int, default=8, help="objects on the one image")
    parser.add_argument("--clicks", type=int, default=1, help="corrections; two answers without a click follow")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SIZES[f"sam_{arguments.size}"]
    fields = {name: getattr(config, name) for name in ("image_size", "width", "depth", "num_heads")}
    asked = {"masks_per_image": arguments.masks, "clicks": arguments.clicks, "global_blocks": config.global_blocks}
    task = SegmentConfig.model_validate({"name": "segment"} | asked)
    expected = segmentation_cost(MAEConfig.model_validate(fields), task, "bf16-mixed")
    print(
        f"plan: {expected.recomputed.peak / 1e9:.1f} GB, {expected.executed / 1e12:.1f} TFLOP, "
        f"with what is computed twice {expected.recomputed.flops / 1e12:.1f}"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with device:
        model = Segmenter(SamEncoder(config), checkpointing=True)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig.model_validate({}), lr=1e-5)
    side = config.image_size[0]
    masks = torch.zeros(arguments.masks, side // STRIDE, side // STRIDE, dtype=torch.bool, device=device)
    for number in range(len(masks)):
        masks[number, 10 * number : 10 * number + 60, 20:90] = True
    rows = torch.zeros(len(masks), dtype=torch.long, device=device)
    images = torch.randn(1, 3, side, side, device=device)
    for number in range(arguments.steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            embedding = model(images)
            embedded = time.perf_counter() - started
            session = simulate_session(
                model,
                embedding,
                masks,
                rows,
                draw_session(len(masks), arguments.clicks, True, torch.Generator(device).manual_seed(0)),
                box_share=0.5,
            )
        session.loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(
            f"step {number + 1}: {time.perf_counter() - started:.1f} s ({embedded:.1f} s for the first pass through "
            f"the encoder), {len(masks)} objects, {3 + arguments.clicks} answers; peak {peak_memory(device) / 1e9:.1f} "
            f"GB (of which {before / 1e9 if device.type == 'cpu' else 0:.1f} GB before there was a model)",
            flush=True,
        )


if __name__ == "__main__":
    main()
