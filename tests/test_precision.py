"""What the choice of arithmetic may change, and what it may not."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import get_total_norm

import mae
from mae.models.pixels import Pixels
from mae.train.optim import OptimConfig
from mae.train.precision import FLOAT32_ERROR, choose_float32_products
from mae.train.pretraining import Pretraining
from mae.train.schedule import derive_schedule


@pytest.fixture(autouse=True)
def _restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def gradients(model: mae.MaskedAutoencoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(4, 3, 64, 64, generator=generator), torch.rand(4, 64, generator=generator)
    model.zero_grad()
    loss = model(images, noise).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_chosen_float32_product_stays_within_the_float32_error() -> None:
    choose_float32_products(torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for rows, inner, columns in ((394, 512, 2048), (50, 768, 768), (2048, 1576, 512)):
        a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
        exact = a.double() @ b.double()
        assert (a @ b - exact).abs().max() <= FLOAT32_ERROR * exact.abs().max()


def test_loss_and_gradients_do_not_depend_on_the_float32_product() -> None:
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(
        mae.MAEConfig(image_size=64, patch_size=8, width=192, depth=3, num_heads=3, decoder_width=64, decoder_depth=2)
    )
    torch.set_float32_matmul_precision("highest")
    loss, expected = gradients(model)
    choose_float32_products(torch.device("cpu"))
    chosen, found = gradients(model)
    assert abs(chosen - loss) <= 1e-6
    for name, gradient in expected.items():
        # The gradient of the key bias is zero in theory.
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_float32_precision_setting_is_kept_on_cuda() -> None:
    torch.set_float32_matmul_precision("high")
    choose_float32_products(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_gradients_are_clipped_to_the_norm_that_they_have_without_the_scale(
    scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OptimConfig.model_validate({"warmup_epochs": 0})
    schedule = derive_schedule(config, samples=8, global_batch=4, micro_batch=4, ranks=1, epochs=1, max_steps=None)
    model = mae.MaskedAutoencoder(mae.MAEConfig(image_size=(32, 32), patch_size=8, width=32, depth=1, num_heads=2))
    module = Pretraining(model, config, schedule, seed=0, pixels=Pixels([0.5] * 3, [0.5] * 3), recipe={})
    # Lightning's trainer has a scaler with 16-mixed alone, which it refuses on a CPU.
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(Pretraining, "trainer", SimpleNamespace(scaler=scaler))
    for limit in (0.01, 1e6):
        _, expected = gradients_of(model, 1.0)
        found, _ = gradients_of(model, scale or 1.0)
        module.configure_gradient_clipping(None, limit)
        factor = min(1.0, limit / expected) * (scale or 1.0)
        torch.testing.assert_close(get_total_norm(found), torch.tensor(expected * factor), rtol=1e-4, atol=0)


def gradients_of(model: mae.MaskedAutoencoder, scale: float) -> tuple[list[torch.Tensor], float]:
    """Returns gradients of a loss times `scale`, as the model holds them, and their norm."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    loss = model(torch.randn(4, 3, 32, 32, generator=generator), torch.rand(4, 16, generator=generator)).loss
    (loss * scale).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return found, float(get_total_norm(found))
