"""Muon: torch's update for each matrix, AdamW's for the rest, on any number of ranks; bad gradients change nothing."""

import copy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import AdamW

import mae
from mae.errors import ConfigError
from mae.run.checkpoint_files import refuse_other_run
from mae.train import muon as muon_file
from mae.train.muon import COEFFICIENTS, Muon, assign, iterate
from mae.train.optim import OptimConfig, build_optimizer, is_matrix

TINY = {"width": 32, "depth": 2, "num_heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SETTINGS = OptimConfig(name="muon", weight_decay=0.1, muon_lr=3.0)


def tiny() -> mae.MaskedAutoencoder:
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(mae.MAEConfig(image_size=(32, 32), patch_size=8, **TINY))


def gradients(model: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        parameter.grad = gradient.clone() if parameter.requires_grad else None
    return found


def test_matrices_follow_torchs_muon_and_the_rest_follows_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_file, "COEFFICIENTS", ((3.4445, -4.775, 2.0315),) * 5)  # torch's
    ours, theirs = tiny(), tiny()
    optimizer = build_optimizer(ours.named_parameters(), SETTINGS, lr=1e-2)
    assert isinstance(optimizer, Muon)
    named = dict(theirs.named_parameters())
    matrices = {name for name, parameter in named.items() if is_matrix(name, parameter)}
    assert len(matrices) == 4 * 3
    # torch's takes whole parameters: q, k and v are matrices of their own here.
    parts = {name: [*named[name].detach().clone().chunk(3 if "qkv" in name else 1)] for name in matrices}
    pieces = [nn.Parameter(piece.clone()) for name in sorted(matrices) for piece in parts[name]]
    muon = torch.optim.Muon(pieces, lr=3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [
        {
            "params": [
                p
                for n, p in named.items()
                if p.requires_grad and n not in matrices and p.ndim >= 2 and n.endswith("weight")
            ],
            "weight_decay": 0.1,
        },
        {
            "params": [
                p
                for n, p in named.items()
                if p.requires_grad and n not in matrices and not (p.ndim >= 2 and n.endswith("weight"))
            ],
            "weight_decay": 0.0,
        },
    ]
    adam = AdamW(rest, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(5):
        gradients(ours, seed)
        gradients(theirs, seed)
        whole = [piece for name in sorted(matrices) for piece in named[name].grad.chunk(3 if "qkv" in name else 1)]
        for piece, gradient in zip(pieces, whole, strict=True):
            piece.grad = gradient.clone()
        optimizer.step()
        muon.step()
        adam.step()
    updated, begun = dict(ours.named_parameters()), dict(tiny().named_parameters())
    start, made = (torch.cat([model[name].flatten() for name in sorted(matrices)]) for model in (begun, updated))
    expected = torch.cat([piece.flatten() for piece in pieces])
    assert (made - expected).norm() < 0.04 * (expected - start).norm()  # bfloat16, rounded at other places
    for name in named.keys() - matrices:
        torch.testing.assert_close(updated[name], named[name], rtol=1e-6, atol=1e-7)


def test_directions_are_close_to_orthogonal_in_float32_and_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [
        torch.randn(rows, columns, generator=generator) for rows, columns in ((48, 16), (16, 16), (16, 64), (16, 16))
    ]
    shapes = [(3, 16, 16), (1, 16, 16), (1, 16, 64), (1, 16, 16)]
    exact, coarse = (iterate(updates, shapes, dtype) for dtype in (torch.float32, torch.bfloat16))
    for update, shape, found, rounded in zip(updates, shapes, exact, coarse, strict=True):
        assert found.shape == update.shape
        for matrix, part in zip(update.view(shape), found.view(shape), strict=True):
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            values = values / values.norm()
            for a, b, c in COEFFICIENTS:
                values = a * values + b * values**3 + c * values**5
            torch.testing.assert_close(part, left @ torch.diag(values) @ right, rtol=0, atol=1e-4)
        assert (rounded - found).norm() < 0.15 * found.norm()


@pytest.mark.parametrize("shape", [(192, 192), (192, 768), (768, 192)])
@pytest.mark.parametrize("rank", [1, 8, 192])
def test_singular_values_stay_near_one_whatever_the_rank(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    (found,) = iterate([update], [(1, *shape)], torch.bfloat16)
    values = torch.linalg.svdvals(found.float())
    relative = torch.linalg.svdvals(update) / update.norm()
    expected = values[: (relative > 1e-3).sum()]
    assert len(expected) >= min(rank, 180) and expected.min() > 0.4 and values.max() < 1.6


def everything(model: nn.Module, optimizer: Muon) -> list[Tensor]:
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_bad_gradient_changes_nothing(device: str, monkeypatch) -> None:
    model = tiny()
    optimizer = build_optimizer(model.named_parameters(), SETTINGS, lr=1e-2)
    assert isinstance(optimizer, Muon)
    gradients(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    gradients(model, 1)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad[0] = torch.nan
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    if device == "as on a GPU":  # where the host asks nothing
        monkeypatch.setattr(torch.Tensor, "__bool__", None)
        optimizer._step_matrices(torch.ones(()))
        monkeypatch.undo()
    else:
        optimizer.step()
    assert all(map(torch.equal, before, everything(model, optimizer)))


def test_step_on_a_gpu_is_that_on_a_cpu() -> None:
    models = tiny(), tiny()
    for model, bad in zip(models, (None, torch.zeros(())), strict=True):
        optimizer = build_optimizer(model.named_parameters(), SETTINGS, lr=1e-2)
        assert isinstance(optimizer, Muon)
        for seed in range(3):
            gradients(model, seed)
            optimizer._step_matrices(bad)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_matrices_are_shared_evenly(ranks: int) -> None:
    shapes = [(3, 768, 768), (1, 768, 768), (1, 3072, 768), (1, 768, 3072)] * 12
    owners = assign(shapes, ranks)
    assert owners == assign(shapes, ranks) and set(owners) <= set(range(ranks))
    work = [0] * ranks
    for owner, (parts, rows, columns) in zip(owners, shapes, strict=True):
        short, long = sorted((rows, columns))
        work[owner] += parts * (2 * short * short * long + short**3)
    largest = 2 * 768 * 768 * 3072 + 768**3
    assert max(work) <= sum(work) / ranks + largest


def test_state_is_keyed_by_names_and_holds_one_moment_of_a_matrix(tmp_path: Path) -> None:
    model, other = tiny(), tiny()
    optimizer, fresh = (build_optimizer(m.named_parameters(), SETTINGS, lr=1e-2) for m in (model, other))
    for seed in range(2):
        gradients(model, seed)
        optimizer.step()
    state = optimizer.state_dict()
    assert set(state["state"]["blocks.0.attn.qkv.weight"]) == {"momentum_buffer"}
    assert set(state["state"]["blocks.0.attn.qkv.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(state))
    for m, o in ((model, optimizer), (other, fresh)):
        gradients(m, 5)
        o.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_settings_of_muon_are_refused_without_it_and_the_other_optimisers_checkpoint_too() -> None:
    with pytest.raises(ValidationError, match=r"muon_lr=3\.0 is for Muon alone: set optim=muon"):
        OptimConfig(muon_lr=3.0)
    older = {"optim": OptimConfig().model_dump()}
    with pytest.raises(ConfigError, match=r"optim\.name \(adamw in the checkpoint, muon now\)"):
        refuse_other_run(older, {"optim": OptimConfig(name="muon").model_dump()}, Path("step-00000001.ckpt"))
