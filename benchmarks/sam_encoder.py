"""SAM-style encoder at 1024 × 1024 against segment-anything, timm and transformers, with the same random weights.

    python benchmarks/sam_encoder.py [bfloat16] [float32] [huge] [memory]

Forward passes of one image, interleaved; medians, and median ratios of neighbouring runs.

bfloat16  SAM-B; weights and images converted once for all encoders, since autocast would add the same conversions of
          all weights to every pass
float32   SAM-B; the others as shipped (torch's default products) and at equal settings ("medium" precision, which ours
          always has: on CPUs oneDNN computes the same products)
huge      SAM-H in bfloat16, against timm
memory    peak that the forward pass adds to the resident set of a fresh process
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from mae.formats.sam_names import to_transformers
from mae.formats.segment_anything import peer_arguments, peer_encoder
from mae.models.vit import LayerNorm
from mae.sam.encoder import SIZES, SamEncoder

PEERS = ("segment-anything", "timm", "transformers")
ROUNDS = {"sam_base": 3, "sam_huge": 2}


def main() -> None:
    sections = {"bfloat16": bfloat16, "float32": float32, "huge": huge, "memory": memory}
    torch.set_num_threads(2)
    for name in sys.argv[1:] or sections:
        print(name, flush=True)
        sections[name]()


def bfloat16() -> None:
    compare("sam_base", torch.bfloat16, PEERS)


def huge() -> None:
    compare("sam_huge", torch.bfloat16, ("timm",))


def float32() -> None:
    compare("sam_base", torch.float32, PEERS, settings={"as shipped": "highest", "equal settings": "medium"})


def compare(size: str, dtype: torch.dtype, peers: tuple[str, ...], settings: dict[str, str] | None = None) -> None:
    """Times each encoder once per round and prints the medians."""
    encoders = build(size, dtype, ("ours", *peers))
    images = torch.randn(1, 3, 1024, 1024, generator=torch.manual_seed(0)).to(dtype)
    cases = {("ours", ""): "medium"}
    cases |= {(peer, note): precision for note, precision in (settings or {"": "medium"}).items() for peer in peers}
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    embeddings: dict[str, Tensor] = {}
    for number in range(ROUNDS[size] + 1):
        for case, precision in cases.items():
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            embeddings[case[0]] = forward(encoders[case[0]], images)
            if number:
                times[case].append(time.perf_counter() - start)
    ours = times[("ours", "")]
    print(f"  ours {statistics.median(ours):.2f} s")
    for (peer, note), taken in times.items():
        if peer != "ours":
            ratio = statistics.median(theirs / mine for theirs, mine in zip(taken, ours, strict=True))
            apart = (embeddings[peer] - embeddings["ours"]).norm() / embeddings["ours"].norm()
            print(
                f"  {peer} {note} {statistics.median(taken):.2f} s, ratio {ratio:.2f}, embeddings {apart:.0e} apart",
                flush=True,
            )


def memory() -> None:
    """Prints the MiB that a forward pass of SAM-B adds, each encoder in a process of its own."""
    for dtype in (torch.bfloat16, torch.float32):
        for name in ("ours", *PEERS):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"  {name}, {dtype}: {pool.apply(added_memory, (name, dtype)):.0f} MiB", flush=True)


def added_memory(name: str, dtype: torch.dtype) -> float:
    torch.set_num_threads(2)
    encoder = build("sam_base", dtype, (name,))[name]
    images = torch.randn(1, 3, 1024, 1024).to(dtype)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    forward(encoder, images)
    return resident("VmHWM") - before


def resident(line: str) -> float:
    """Returns VmRSS or VmHWM of this process in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{line}:")[1].split()[0]) / 1024


@torch.inference_mode()
def forward(encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return encoder(images)


def build(size: str, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Builds encoders with equal weights, as functions of images."""
    torch.manual_seed(0)
    ours = SamEncoder(SIZES[size])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # relative positions begin at zero
    functions = {
        "ours": lambda: ours.to(dtype).eval(),
        "segment-anything": lambda: segment_anything(ours).to(dtype).eval(),
        "timm": lambda: timm(ours).to(dtype).eval().forward_features,
        "transformers": lambda: transformers(ours, dtype),
    }
    return {name: functions[name]() for name in sorted(names, key=lambda name: name == "ours")}


def segment_anything(ours: SamEncoder) -> nn.Module:
    encoder = peer_encoder(peer_arguments(ours.config))
    encoder.load_state_dict(ours.state_dict())
    return encoder


def timm(ours: SamEncoder) -> VisionTransformerSAM:
    config = ours.config
    encoder = VisionTransformerSAM(
        img_size=config.image_size[0],
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=0,
        neck_chans=config.out_channels,
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
        norm_layer=LayerNorm,
    )
    encoder.load_state_dict({key.replace("mlp.lin", "mlp.fc"): value for key, value in ours.state_dict().items()})
    return encoder


def transformers(ours: SamEncoder, dtype: torch.dtype, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    from transformers import SamVisionConfig, SamVisionModel

    config = ours.config
    settings = SamVisionConfig(
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        window_size=config.window,
        output_channels=config.out_channels,
        mlp_ratio=config.mlp_ratio,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        global_attn_indexes=list(config.global_blocks),
    )
    encoder = cast(nn.Module, SamVisionModel(settings))
    encoder.load_state_dict(to_transformers(ours.state_dict(prefix="encoder.")))
    encoder.to(device, dtype).eval()
    return lambda images: encoder(images).last_hidden_state


if __name__ == "__main__":
    main()
