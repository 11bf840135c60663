"""LoRA on the attention of an encoder (Hu et al. 2021), by peft: added, and merged into its weights."""

from torch import nn

from mae.errors import ConfigError

ADAPTED = "qkv"


def add_lora(encoder: nn.Module, rank: int) -> None:
    """Adds a LoRA adapter of this rank, zero at first, to every `qkv`; all other parameters are frozen.

    Raises ConfigError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "task.encoder=lora needs the package peft, which is not installed: pip install 'mae-pretrain[sam]'"
        ) from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[ADAPTED]), encoder)


def merge_lora(encoder: nn.Module) -> None:
    """Merges the LoRA weights into the linear layers and removes the adapters."""
    from peft.tuners.lora import LoraLayer

    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())
