"""Fused attention against batched products, interleaved: python -m benchmarks.attention

Prints both medians and the median ratio of neighbouring runs, on the GPU if there is one: for training steps, and for
encoding whole images of more and more patches, with and without gradients. From the latter comes LONGEST_PRODUCTS of
mae/models/attention.py.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW

import mae
from mae.models.attention import set_attention
from mae.models.noise import uniform_noise

ROUNDS = 12
SMALL = {"width": 384, "depth": 12, "num_heads": 6}
STEPS = {
    "step, cifar10_tiny, batch 64": (
        {"image_size": 32, "patch_size": 4, "width": 192, "depth": 6, "num_heads": 3}
        | {"decoder_width": 128, "decoder_depth": 1, "decoder_num_heads": 4},
        64,
    ),
    "step, ViT-S/16 at 224, batch 8": (SMALL, 8),
}
ENCODED = {224: 8, 384: 4, 512: 2, 768: 1, 1024: 1}  # side of the images and number of them, ViT-S/16


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (fields, batch) in STEPS.items():
        model = mae.MaskedAutoencoder(mae.MAEConfig.model_validate(fields)).to(device)
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
        images = torch.randn(batch, 3, *model.config.image_size, device=device)
        rows = torch.arange(batch, device=device)

        def step(number: int, model=model, optimizer=optimizer, images=images, rows=rows) -> None:
            model(images, uniform_noise(0, number, rows, model.config.patches)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        compare(name, model, step, ROUNDS)
    for side, batch in ENCODED.items():
        encoder = mae.Encoder(mae.MAEConfig.model_validate(SMALL | {"image_size": side})).to(device)
        images = torch.randn(batch, 3, side, side, device=device)

        def encode(number: int, encoder=encoder, images=images) -> Tensor:
            with torch.inference_mode():
                return encoder.encode(images)

        def learn(number: int, encoder=encoder, images=images) -> None:
            encoder.encode(images).square().mean().backward()
            encoder.zero_grad()

        for name, run in (("encode", encode), ("with gradients", learn)):
            compare(f"{name}, {encoder.config.patches + 1:,} tokens, batch {batch}", encoder, run, ROUNDS // 2)


def compare(name: str, model: torch.nn.Module, run: Callable[[int], object], rounds: int) -> None:
    device = next(model.parameters()).device

    def timed(number: int, fused: bool) -> float:
        set_attention(model, fused=fused)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            run(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [(timed(number, True), timed(number, False)) for number in range(rounds)][2:]
    fused, products = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(p / f for f, p in times)
    print(
        f"{name}: fused {fused * 1e3:.0f} ms, products {products * 1e3:.0f} ms, products / fused {ratio:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
