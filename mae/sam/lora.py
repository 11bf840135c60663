"""Low-rank additions to the attention of an encoder (Hu et al. 2021), by peft: put in, and merged into its weights."""

from torch import nn

from mae.errors import ConfigError

ADAPTED = "qkv"


def add_lora(encoder: nn.Module, rank: int) -> None:
    """Gives every `qkv` a trainable addition of this rank, zero at first; all other parameters stop to learn.

    Raises ConfigError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "task.encoder=lora needs the package peft, which is not installed: pip install 'mae-pretrain[sam]'"
        ) from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[ADAPTED]), encoder)


def merge_lora(encoder: nn.Module) -> None:
    """Puts plain layers with the sums in the place of those that `add_lora` has changed."""
    from peft.tuners.lora import LoraLayer

    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())
