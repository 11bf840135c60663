"""Training step with each decoder, interleaved: python -m benchmarks.decoder [--rounds 9] [--batch 8]

Forward, backward and update of ViT-B/16 at 224 in bf16, with the decoder of the paper and with cross decoders that
predict all hidden patches or a share of them.
"""

import argparse
import statistics
import time

import torch

import mae
from mae.models.noise import uniform_noise
from mae.plan.executed_flops import executed_pretraining_flops
from mae.train.optim import OptimConfig, build_optimizer

WARM_UP_ROUNDS = 1


class Contender:
    """A model with its optimiser and one batch of random images."""

    def __init__(self, config: mae.MAEConfig, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = mae.MaskedAutoencoder(config).to(device)
        self.optimizer = build_optimizer(self.model.named_parameters(), OptimConfig.model_validate({}), 1e-4)
        self.images = torch.randn(batch, 3, *config.image_size, device=device)
        self.flops = executed_pretraining_flops(config)

    def time_step(self, number: int) -> float:
        """Makes a training step and returns its seconds."""
        device = self.images.device
        noise = uniform_noise(0, number, torch.arange(len(self.images), device=device), self.model.config.patches)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = self.model(self.images, noise).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.75, 1 / 3, 0.25], help="model.predicted")
    arguments = parser.parse_args()
    configs = {"self": mae.MAEConfig.model_validate({})}
    for share in arguments.shares:
        configs[f"cross, {share:.0%} of the hidden"] = mae.MAEConfig.model_validate(
            {"decoder": "cross", "predicted": share}
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders = {name: Contender(config, arguments.batch, device) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(WARM_UP_ROUNDS + arguments.rounds):
        for name, contender in contenders.items():
            took = contender.time_step(number)
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(took)
    for name, contender in contenders.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["self"], seconds[name], strict=True))
        flops = contenders["self"].flops / contender.flops
        print(f"{name:26} {statistics.median(seconds[name]) * 1e3:6.0f} ms  {ratio:.2f}x  (by operations {flops:.2f}x)")


if __name__ == "__main__":
    main()
