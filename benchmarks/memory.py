"""Memory of a training step with and without activation checkpointing: python -m benchmarks.memory

1 bytes that the forward pass saves for the backward pass, counted on tensors without storage (float32, attention as
  batched products as on CPUs)
2 peak resident set of whole processes that make three steps on the CPU
"""

import resource
import subprocess
import sys

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import mae
from mae.models.execution import BlocksConfig, prepare_blocks
from mae.models.noise import uniform_noise
from mae.train.optim import OptimConfig, build_optimizer

BASE = {"width": 768, "depth": 12, "num_heads": 12}
LARGE = {"width": 1024, "depth": 24, "num_heads": 16}
MODES = ("none", "attention", "2", "all")
BATCH = 16


def saved_bytes(model: nn.Module, images: Tensor, noise: Tensor) -> int:
    """Counts what autograd saves for the backward pass, each storage once, without parameters and inputs."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), images, noise)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images, noise)
    return sum(storage.nbytes() for storage in saved.values())


def saved_per_image(fields: dict[str, int], recompute: str) -> int:
    """Returns the bytes saved per image."""
    with torch.device("meta"):
        model = mae.MaskedAutoencoder(mae.MAEConfig.model_validate(fields))
        images = torch.empty(BATCH, 3, *model.config.image_size)
        noise = torch.empty(BATCH, model.config.patches)
    prepare_blocks(model.whole_blocks, BlocksConfig(recompute=int(recompute) if recompute.isdigit() else recompute))
    return saved_bytes(model, images, noise) // BATCH


def peak_resident(recompute: str) -> int:
    """Makes three bf16 steps of ViT-B/16, or of transformers' ViTMAE, and returns the peak resident set in bytes."""
    noise = uniform_noise(0, 0, torch.arange(BATCH), 196)
    images = torch.randn(BATCH, 3, 224, 224)
    if recompute == "transformers":
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        theirs = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)).train()
        optimizer = AdamW(theirs.parameters(), lr=1e-4, fused=True)

        def loss() -> Tensor:
            return theirs(images, noise=noise).loss
    else:
        ours = mae.MaskedAutoencoder(mae.MAEConfig.model_validate(BASE))
        prepare_blocks(ours.whole_blocks, BlocksConfig(recompute=int(recompute) if recompute.isdigit() else recompute))
        optimizer = build_optimizer(ours.named_parameters(), OptimConfig.model_validate({}), 1e-4)

        def loss() -> Tensor:
            return ours(images, noise).loss

    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    if sys.argv[1:]:
        print(peak_resident(sys.argv[1]))
        return
    print("recompute    kept per image: ViT-B/16        ViT-L/16        process of a bf16 step, ViT-B/16, batch 16")
    all_saved = [saved_per_image(fields, "none") for fields in (BASE, LARGE)]
    for mode in (*MODES, "transformers"):
        row = f"{mode:12}"
        for fields, most in zip((BASE, LARGE), all_saved, strict=True):
            saved = saved_per_image(fields, mode) if mode in MODES else None
            row += f" {saved / 1e6:7.1f} MB {saved / most:5.0%} " if saved is not None else " " * 18
        command = [sys.executable, "-m", "benchmarks.memory", mode]
        resident = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{row} {resident / 1e9:6.2f} GB", flush=True)


if __name__ == "__main__":
    main()
