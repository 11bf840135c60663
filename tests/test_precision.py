"""What the choice of arithmetic may change, and what it may not."""

import pytest
import torch

import mae
from mae.train.precision import FLOAT32_ERROR, choose_float32_products


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
