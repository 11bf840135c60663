"""`precision=auto`: bfloat16 where the hardware multiplies it natively, float32 elsewhere."""

import torch

# Of a product of float32 matrices relative to its largest value; rounding bfloat16 would make it 1e-3.
FLOAT32_ERROR = 2e-6


def resolve_precision(setting: str) -> str:
    """Lightning's name of the precision that `setting` means on this machine.

    Mixed precision keeps weights, optimiser state and loss in float32. A run stores the outcome at its first start and
    keeps it on every resume, since another precision would be another run.
    """
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def choose_float32_products(device: torch.device) -> None:
    """Lets oneDNN multiply float32 matrices on CPUs, if it is exact here; a setting of the whole process.

    torch's "medium" allows bfloat16. Where a CPU has no units for that (AMX) oneDNN computes in float32 all the same,
    on some CPUs faster than the default library: one product shows which. GPUs are left alone, where TF32 is the
    user's choice (`torch.backends.cuda.matmul`).
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
