"""Precision: `precision=auto` by the hardware, and float32 products on CPUs."""

import torch

# Largest error of a float32 matrix product, relative to its largest value; rounding to bfloat16 would make it 1e-3.
FLOAT32_ERROR = 2e-6


def resolve_precision(setting: str) -> str:
    """Returns Lightning's name of a precision; for "auto" bf16-mixed if the hardware multiplies bfloat16, else 32-true.

    Mixed precision keeps weights, optimiser state and loss in float32. A run stores the result at its first start and
    keeps it on every resume, since another precision would give another result.
    """
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def choose_float32_products(device: torch.device) -> None:
    """Lets oneDNN multiply float32 matrices on CPUs if it is exact there. Sets torch's precision for the whole process.

    torch's "medium" allows bfloat16. On a CPU without units for it (AMX) oneDNN still computes in float32, on some CPUs
    faster than the default library; one product shows whether it does. GPUs are left alone, where TF32 is the user's
    choice (`torch.backends.cuda.matmul`).
    """
    if device.type != "cpu":
        return
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if (a @ b - exact).abs().max() > FLOAT32_ERROR * exact.abs().max():
        torch.set_float32_matmul_precision(before)
