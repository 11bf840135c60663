"""Fused attention against batched products in a training step, interleaved: python benchmarks/attention.py

Prints both medians and the median ratio of neighbouring runs, on the GPU if there is one.
"""

import statistics
import time

import torch
from torch.optim import AdamW

import mae
from mae.models.noise import uniform_noise
from mae.models.vit import choose_attention

ROUNDS = 12
CASES = {
    "cifar10_tiny, batch 64": (
        {"image_size": 32, "patch_size": 4, "width": 192, "depth": 6, "num_heads": 3}
        | {"decoder_width": 128, "decoder_depth": 1, "decoder_num_heads": 4},
        64,
    ),
    "ViT-S/16 at 224, batch 8": ({"width": 384, "depth": 12, "num_heads": 6}, 8),
}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (fields, batch) in CASES.items():
        model = mae.MaskedAutoencoder(mae.MAEConfig.model_validate(fields)).to(device)
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
        images = torch.randn(batch, 3, *model.config.image_size, device=device)
        rows = torch.arange(batch, device=device)

        def step(number: int, fused: bool, model=model, optimizer=optimizer, images=images, rows=rows) -> float:
            # `choose_attention` chooses by the kind of device alone.
            choose_attention(model.blocks, model.decoder_blocks, device=torch.device("cuda" if fused else "cpu"))
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(images, uniform_noise(0, number, rows, model.config.patches)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        times = [(step(number, True), step(number, False)) for number in range(ROUNDS)][2:]
        fused, products = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(p / f for f, p in times)
        print(f"{name}: fused {fused * 1e3:.0f} ms, products {products * 1e3:.0f} ms, products / fused {ratio:.2f}")


if __name__ == "__main__":
    main()
