"""Share of the optimiser in a training step on the CPU: python -m benchmarks.optimiser [--rounds 7] [--vit-base]

The model of cifar10_tiny (encoder 6 x 192, decoder 1 x 128, patches of 4 on 32 px) under bf16 autocast; with --vit-base
ViT-B/16 at 224 px, micro-batches of 8, 16 of them in a step. In each round AdamW and Muon update the same model after
the same forward and backward pass, in turn. Under torchrun the ranks share Muon's update; gradients are not exchanged.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist

import mae
from mae.train.muon import update_flops
from mae.train.optim import OptimConfig, build_optimizer

SHAPE = {"image_size": 32, "patch_size": 4, "width": 192, "depth": 6, "num_heads": 3}
DECODER = {"decoder_width": 128, "decoder_depth": 1, "decoder_num_heads": 4}
BATCHES = (64, 128, 256)
ACCUMULATE = 16  # of ViT-B


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vit-base", action="store_true")
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    config = mae.MAEConfig.model_validate({} if options.vit_base else SHAPE | DECODER)
    batches, passes = ((8,), ACCUMULATE) if options.vit_base else (BATCHES, 1)
    model = mae.MaskedAutoencoder(config)
    optimizers = {
        name: build_optimizer(model.named_parameters(), OptimConfig.model_validate({"name": name}), lr=1e-4)
        for name in ("adamw", "muon")
    }
    if speaks := not dist.is_initialized() or dist.get_rank() == 0:
        print(f"Muon: {update_flops(model.named_parameters()) / 1e9:.1f} GFLOP an update, of all ranks together")
    patches = config.grid[0] * config.grid[1]
    for batch in batches:
        images, noise = torch.randn(batch, 3, *config.image_size), torch.rand(batch, patches)
        taken: dict[str, list[float]] = {"pass": [], "adamw": [], "muon": []}
        for _ in range(options.rounds + 1):
            for name, optimizer in optimizers.items():
                begun = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(images, noise).loss
                loss.backward()
                if dist.is_initialized():
                    dist.barrier()
                middle = time.perf_counter()
                optimizer.step()
                taken["pass"].append(middle - begun)
                taken[name].append(time.perf_counter() - middle)
                optimizer.zero_grad()
        compute, *updates = (statistics.median(values[1:]) for values in taken.values())
        shares = ", ".join(
            f"{name} {1000 * seconds:.1f} ms ({seconds / (passes * compute + seconds):.1%} of a step)"
            for name, seconds in zip(optimizers, updates, strict=True)
        )
        if speaks:
            print(
                f"batch {batch} x {passes}: a forward and backward pass {1000 * compute:.0f} ms; {shares}", flush=True
            )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
