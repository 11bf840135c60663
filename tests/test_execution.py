"""However the blocks are computed, they are the same function."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import mae
from benchmarks.memory import LARGE, saved_per_image
from mae.models.classifier import Classifier
from mae.models.execution import BlocksConfig, prepare_blocks

SMALL = {"width": 32, "depth": 3, "num_heads": 2, "decoder_width": 32, "decoder_depth": 3, "decoder_num_heads": 2}


def prepared(**settings) -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(mae.MAEConfig.model_validate({"image_size": 32, "patch_size": 8} | SMALL))
    prepare_blocks(model.whole_blocks, BlocksConfig(**settings))
    return model


def batch(size: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=random), torch.rand(size, 16, generator=random)


def step(model: mae.MaskedAutoencoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        loss = model(*batch(4)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["attention", "all", 1, 2])
def test_activation_checkpointing_gives_bit_equal_gradients(recompute: str | int, dtype: torch.dtype) -> None:
    expected, got = step(prepared(), dtype), step(prepared(recompute=recompute), dtype)
    assert expected.keys() == got.keys() and len(got) > 40
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_activation_checkpointing_keeps_under_15_percent_of_vit_large_activations() -> None:
    whole = saved_per_image(LARGE, "none")
    assert saved_per_image(LARGE, "all") < 0.15 * whole
    assert saved_per_image(LARGE, "all") < saved_per_image(LARGE, "2") < saved_per_image(LARGE, "attention") < whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while it traces
def test_compiled_classifier_needs_two_graphs_whatever_each_block_leaves_out() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    config = mae.MAEConfig.model_validate({"image_size": 32, "patch_size": 8} | SMALL | {"depth": 12})
    gradients = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = Classifier(config, 5, drop_path=0.5)
        prepare_blocks(list(model.blocks), BlocksConfig(compile=compile))
        for number in range(2):
            torch.manual_seed(number)
            model(torch.randn(8, 3, 32, 32), torch.rand(8, 1)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 2  # the first block leaves nothing out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while it traces
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_compiled_blocks_give_close_gradients_and_compile_once(recompute: str) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()  # reset leaves what tests before this one compiled in the same process
    expected, model = step(prepared(), torch.float32), prepared(recompute=recompute, compile=True)
    assert model.state_dict().keys() == prepared().state_dict().keys()
    got = step(model, torch.float32)
    assert all(torch.allclose(expected[name], got[name], atol=1e-5) for name in expected)
    compiled = counters["stats"]["unique_graphs"]
    # One for the blocks of the encoder, one for those of the decoder; in the recomputation torch wants them again.
    assert 0 < compiled <= (2 if recompute == "none" else 4)
    with torch.no_grad():  # a validation whose last batch is smaller
        model(*batch(4))
        model(*batch(3))
    step(model, torch.float32)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("value", ["every", 0, -1])
def test_unknown_recompute_raises_validation_error(value: str | int) -> None:
    with pytest.raises(ValidationError, match="is none of none, attention, all or a number of blocks"):
        BlocksConfig(recompute=value)
