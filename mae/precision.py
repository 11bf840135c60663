"""`precision=auto`: bfloat16 where the hardware multiplies it natively, float32 elsewhere."""

import torch


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
