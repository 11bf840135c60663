"""Training step beside those of other libraries, interleaved: python -m benchmarks.step [--rounds 9] [--batch 8]

Forward, backward and update of ViT-B/16 at 224 with the same weights, images and masks. All losses are compared before
anything is timed. Settings:

bf16            autocast for all
float32         each as shipped: ours chooses the precision of float32 products, the others keep torch's default
float32, equal  the same precision of products for all

Peers, both with torch's default AdamW:

transformers    ViTMAEForPreTraining with torch's fused attention ("sdpa")
lightly         MaskedVisionTransformerTIMM and its decoder, assembled as in its documentation
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW

import mae
from mae.models.flops import pretraining_flops
from mae.models.noise import uniform_noise
from mae.train.optim import OptimConfig, build_optimizer
from mae.train.precision import choose_float32_products

Loss = Callable[[Tensor, Tensor], Tensor]
PRODUCT_SIDE = 4096  # rows of the square matrices whose product is the ceiling
WARM_UP_ROUNDS = 2


def contenders(
    size: dict[str, Any], device: torch.device, peers: tuple[str, ...]
) -> tuple[mae.MAEConfig, dict[str, tuple[nn.Module, Loss]]]:
    """Builds the models with equal weights, each with its loss function; `size` is settings of ViTMAEConfig."""
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6, **size)
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = mae.load(folder)
        # Loading sets the decoder positions to those of the file, as in ours.
        theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder, attn_implementation="sdpa")
    assert isinstance(ours, mae.MaskedAutoencoder)
    models: dict[str, tuple[nn.Module, Loss]] = {"ours": (ours, lambda images, noise: ours(images, noise).loss)}
    if "transformers" in peers:
        models["transformers"] = theirs, lambda images, noise: theirs(images, noise=noise).loss
    if "lightly" in peers:
        from benchmarks.entries.lightly import LightlyMAE  # benchmarks/gpu.py runs without lightly

        lightly = LightlyMAE(ours.config)
        lightly.load_ours(ours.state_dict())
        models["lightly"] = lightly, lightly
    for model, _ in models.values():
        model.to(device).train()
    return ours.config, models


class Steps:
    """Timed training steps of all contenders on the same images; ViT-B/16 unless `size` is given."""

    def __init__(
        self,
        batch: int,
        device: torch.device,
        size: dict[str, Any] | None = None,
        peers: tuple[str, ...] = ("transformers", "lightly"),
    ) -> None:
        self.config, self.models = contenders(size or {}, device, peers)
        self.device = device
        self.images = torch.randn(batch, 3, *self.config.image_size, device=device)
        self.rows = torch.arange(batch, device=device)
        self.optimizers = {
            name: build_optimizer(model.named_parameters(), OptimConfig.model_validate({}), 1e-4)
            if name == "ours"
            else AdamW(model.parameters())
            for name, (model, _) in self.models.items()
        }

    def noise(self, number: int) -> Tensor:
        return uniform_noise(0, number, self.rows, self.config.patches)

    def check(self) -> None:
        """Checks that the losses of all contenders agree under the same masks."""
        with torch.no_grad():
            losses = {name: float(loss(self.images, self.noise(0))) for name, (_, loss) in self.models.items()}
        print("loss in float32:", ", ".join(f"{name} {value:.7f}" for name, value in losses.items()))
        assert max(losses.values()) - min(losses.values()) < 5e-6, losses

    def time_step(self, name: str, number: int, bf16: bool) -> float:
        """Makes a training step and returns its seconds."""
        _, loss = self.models[name]
        started = time.perf_counter()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            value = loss(self.images, self.noise(number))
        value.backward()
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        self.wait()
        return time.perf_counter() - started

    def ceiling(self, dtype: torch.dtype) -> float:
        """Measures FLOP/s of a product of square matrices."""
        matrix = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=self.device).to(dtype)
        started = time.perf_counter()
        _ = matrix @ matrix
        self.wait()
        return 2 * PRODUCT_SIDE**3 / (time.perf_counter() - started)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(steps: Steps, setting: str, rounds: int) -> dict[str, float]:
    """Returns median seconds, median ratios to ours, and the share of the ceiling that ours reaches."""
    bf16 = setting == "bf16"
    flops = pretraining_flops(steps.config) * len(steps.images)
    seconds: dict[str, list[float]] = {name: [] for name in steps.models}
    shares = []
    for number in range(WARM_UP_ROUNDS + rounds):
        for name in steps.models:
            torch.set_float32_matmul_precision("highest")
            if setting != "float32" or name == "ours":
                choose_float32_products(steps.device)
            took = steps.time_step(name, number, bf16)
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(took)
        ceiling = steps.ceiling(torch.bfloat16 if bf16 else torch.float32)
        if number >= WARM_UP_ROUNDS:
            shares.append(flops / seconds["ours"][-1] / ceiling)
    print(f"\n{setting}, batch {len(steps.images)}")
    share = statistics.median(shares)
    result = {"ours, share of the ceiling": share}
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["ours"], strict=True))
        result |= {f"{name}, s": statistics.median(values), f"{name} / ours": ratio}
        print(f"  {name:14} {statistics.median(values) * 1e3:7.0f} ms   {ratio:.2f} of ours")
    print(f"  ours does {share:.0%} of the floating-point operations of a matrix product in the same time")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=["bf16", "float32", "float32, equal"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    steps = Steps(arguments.batch, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    steps.check()
    results = {setting: measure(steps, setting, arguments.rounds) for setting in arguments.settings}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
