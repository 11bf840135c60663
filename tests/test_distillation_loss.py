"""Distillation's mathematics: the loss by other lines, grids, floors, the frozen teacher and its cache."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mae
from data.config import DataConfig
from data.mask_datamodule import MaskDataModule
from data.order.samplers import MicroBatch
from data.photograph_datamodule import PhotographDataModule
from mae.distill.floors import trivial_cosine_losses, trivial_embedding_losses
from mae.distill.flops import executed_distillation_flops
from mae.distill.loss import Tokens, embedding_loss, match_grid, token_loss
from mae.distill.student import SamStudent, Student
from mae.distill.teacher import Teacher, encode, open_teacher
from mae.models.noise import uniform_noise
from mae.models.pixels import Pixels
from mae.sam.embedding_cache import OutputCache
from mae.sam.encoder import SamConfig
from tests.exports import own_checkpoint, photograph
from tests.masked_photos import shards_of_shapes

STUDENT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
SAM = SamConfig(image_size=(64, 64), width=32, depth=2, num_heads=2, window=2, global_blocks=(1,), out_channels=16)


def teacher_of(tmp_path: Path, **fields) -> tuple[mae.MaskedAutoencoder, Teacher]:
    """A masked autoencoder with random weights, and the same as a teacher."""
    model, path = own_checkpoint(tmp_path, **fields)
    return model, open_teacher(path, None, 3)


def tokens(images: int = 3, class_tokens: int = 1, grid: tuple[int, int] = (4, 4), width: int = 5) -> Tokens:
    torch.manual_seed(3)
    return Tokens(torch.randn(images, class_tokens, width) + 0.5, torch.randn(images, *grid, width) + 0.5)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1) / (one.square().sum(-1).sqrt() * other.square().sum(-1).sqrt())


# The loss.


@torch.no_grad()
def test_loss_of_whole_images_is_one_minus_cosine_of_class_and_patch_tokens(tmp_path: Path) -> None:
    model, teacher = teacher_of(tmp_path)
    student = Student(mae.MAEConfig(**STUDENT), teacher.width)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.25, 0.3])  # of own_checkpoint
    theirs = model.encode((pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).bfloat16().float()
    images = photograph(student.config, 3)
    first, norm, gelu, last = student.distillation_head
    ours = last(gelu(norm(first(student.encode(images)))))
    expected = (2 - cosine(ours[:, :1], theirs[:, :1]).mean() - cosine(ours[:, 1:], theirs[:, 1:]).mean()) / 2
    assert isinstance(gelu, nn.GELU) and isinstance(norm, nn.LayerNorm)
    torch.testing.assert_close(student.imitate(images, teacher(pixels)), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_masked_student_is_compared_at_its_visible_patches_alone() -> None:
    config = mae.MAEConfig(**STUDENT, mask_ratio=0.5, mask_cell=2)
    student, target = Student(config, 5, config), tokens(grid=(4, 4))
    images, noise = photograph(config, 3), uniform_noise(0, 7, torch.arange(3), 16)
    loss = student.imitate(images, target, noise)
    ids = [[cell for cell in range(16) if rank[cell // 8 * 2 + cell % 4 // 2] < 2] for rank in ranks_of_cells(noise)]
    latent = student.encode_tokens(student.embed(take(student.patchify(images), ids), torch.tensor(ids)))
    ours = student.distillation_head(latent)
    of_patches = 1 - cosine(ours[:, 1:], take(target.patches.flatten(1, 2), ids)).mean()
    of_class = 1 - cosine(ours[:, :1], target.class_tokens).mean()
    torch.testing.assert_close(loss, (of_patches + of_class) / 2, rtol=1e-5, atol=1e-6)
    hidden = Tokens(target.class_tokens, target.patches.clone())
    for row, seen in enumerate(ids):
        hidden.patches.flatten(1, 2)[row, [patch for patch in range(16) if patch not in seen]] = 1e3
    torch.testing.assert_close(student.imitate(images, hidden, noise), loss)


def ranks_of_cells(noise: Tensor) -> list[list[int]]:
    """Returns the rank of each of 2 x 2 cells, by the noise of its first patch."""
    first = noise.view(-1, 4, 4)[:, ::2, ::2].reshape(-1, 4)
    return [[sorted(row).index(value) for value in row] for row in first.tolist()]


def take(patches: Tensor, ids: list[list[int]]) -> Tensor:
    return torch.stack([row[one] for row, one in zip(patches, ids, strict=True)])


def test_class_tokens_of_other_numbers_are_compared_by_their_means() -> None:
    target, ours, patches = tokens(class_tokens=8), torch.randn(3, 2, 5), torch.randn(3, 16, 5)
    alone = 1 - cosine(patches, target.patches.flatten(1, 2)).mean()
    of_class = 1 - cosine(ours.mean(1), target.class_tokens.mean(1)).mean()
    torch.testing.assert_close(token_loss(ours, patches, target, (4, 4), None), (alone + of_class) / 2)
    without = Tokens(target.class_tokens[:, :0], target.patches)
    torch.testing.assert_close(token_loss(ours, patches, without, (4, 4), None), alone)
    torch.testing.assert_close(token_loss(ours[:, :0], patches, target, (4, 4), None), alone)


def test_grid_of_tokens_is_resized_linearly_and_kept_where_it_fits() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    ramp = torch.stack([rows, columns], dim=-1)[None]
    assert torch.equal(match_grid(ramp, (8, 6)), ramp.flatten(1, 2))
    halved = match_grid(ramp, (4, 3)).view(4, 3, 2)
    inner = halved[1:-1, 1:-1]  # at the edge there is nothing on the other side
    expected = torch.stack(torch.meshgrid(torch.tensor([2.5, 4.5]), torch.tensor([2.5]), indexing="ij"), dim=-1)
    torch.testing.assert_close(inner, expected)
    assert match_grid(ramp.bfloat16(), (16, 12)).shape == (1, 192, 2)


def test_embedding_loss_is_the_mean_square_over_channels_and_places() -> None:
    target, embedding = tokens(class_tokens=0), torch.randn(3, 5, 4, 4)
    expected = np.mean((embedding.numpy() - target.patches.permute(0, 3, 1, 2).numpy()) ** 2)
    assert float(embedding_loss(embedding, target)) == pytest.approx(float(expected), rel=1e-6)


# Floors.


def test_floors_are_the_losses_of_the_best_constant_tokens() -> None:
    target = tokens(images=9)
    batches = [Tokens(target.class_tokens[rows], target.patches[rows]) for rows in (slice(4), slice(4, 9))]
    floors = trivial_cosine_losses(batches, (4, 4), 1)

    def loss_of(class_token: Tensor, patches: Tensor) -> float:
        constant = class_token.expand(9, 1, 5), patches.expand(9, 16, 5)
        return float(token_loss(*constant, target, (4, 4), None))

    first = F.normalize(target.class_tokens, dim=-1).mean(0)
    places = F.normalize(target.patches.flatten(1, 2), dim=-1).mean(0)
    assert floors["one token"] == pytest.approx(loss_of(first, places.mean(0)), abs=1e-6)
    assert floors["mean of each place"] == pytest.approx(loss_of(first, places), abs=1e-6)
    assert floors["mean of each place"] < floors["one token"] < loss_of(first + torch.randn(5) * 0.1, places.mean(0))
    squares = trivial_embedding_losses(batches, (4, 4))
    values = target.patches.flatten(1, 2)
    assert squares["predict 0"] == pytest.approx(float(values.square().mean()), rel=1e-6)
    assert squares["one token"] == pytest.approx(float((values - values.mean((0, 1))).square().mean()), rel=1e-6)
    assert squares["mean of each place"] == pytest.approx(float((values - values.mean(0)).square().mean()), rel=1e-6)


def test_floors_without_a_class_token_on_either_side_are_of_patches_alone() -> None:
    target = tokens(images=9)
    alone = trivial_cosine_losses([Tokens(target.class_tokens[:, :0], target.patches)], (4, 4), 1)
    assert alone == trivial_cosine_losses([target], (4, 4), 0)
    of_means = trivial_cosine_losses([tokens(images=9, class_tokens=8)], (4, 4), 1)
    assert 0 < of_means["mean of each place"] < of_means["one token"] < 1


# The teacher.


def test_teacher_is_frozen_without_a_decoder_and_sees_its_own_size_and_scale(tmp_path: Path) -> None:
    model, teacher = teacher_of(tmp_path, image_size=64)
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())
    assert type(teacher.encoder) is mae.Encoder and not teacher.encoder.training
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = Pixels((0.3, 0.4, 0.5), (0.2, 0.25, 0.3)).normalise(pixels)
    larger = F.interpolate(normalised, (64, 64), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = model.encode(larger).bfloat16()
    found = teacher(pixels)
    assert not found.patches.requires_grad
    assert torch.equal(found.class_tokens, expected[:, :1])
    assert torch.equal(found.patches.flatten(1, 2), expected[:, 1:])
    smaller = open_teacher(tmp_path / "step-00000500.ckpt", (32, 32), 3)
    assert smaller.grid == (4, 4) and smaller.fingerprint == teacher.fingerprint
    other = copy.deepcopy(teacher.encoder)
    assert Teacher(other, teacher.pixels, tmp_path).fingerprint == teacher.fingerprint
    other.blocks[0].mlp.fc1.bias[0] += 1e-3
    assert Teacher(other, teacher.pixels, tmp_path).fingerprint != teacher.fingerprint


@torch.no_grad()
def test_photographs_are_laid_into_the_frame_as_with_masks_and_blank_beside_it(tmp_path: Path) -> None:
    shards = shards_of_shapes(tmp_path / "shapes")
    run = {"seed": 0, "global_batch": 4, "micro_batch": 4}
    config = DataConfig(path=str(shards), workers=0)
    photographs = PhotographDataModule(config, image_size=64, **run)
    masked = MaskDataModule(config, image_size=64, masks_per_image=2, **run)
    numbers = np.arange(4)
    for seed in (None, 5):
        one, other = (
            data.dataset(data.train_index, seed)[MicroBatch(2, numbers, numbers)] for data in (photographs, masked)
        )
        assert torch.equal(one["images"], other["images"]) and np.array_equal(one["inside"], other["inside"])
    assert one["inside"].tolist() == [[48, 64]] * 4 and not one["images"][:, :, 48:].any()
    teacher = Teacher(mae.SamEncoder(SAM), Pixels((0.5,) * 3, (0.5,) * 3), tmp_path)
    images = Pixels((0.5,) * 3, (0.5,) * 3).normalise(one["images"])
    images[:, :, 48:] = 0
    found = teacher(one["images"], None, torch.from_numpy(one["inside"]))
    assert torch.equal(found.patches, encode(teacher.encoder, images).patches.bfloat16())


def test_kept_tokens_are_those_computed_and_damaged_ones_are_computed_again(tmp_path: Path) -> None:
    _, teacher = teacher_of(tmp_path)
    pixels, samples = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.tensor([4, -1, 2])
    expected = teacher(pixels)
    teacher.cache = OutputCache(tmp_path / "kept", "key", teacher.shape, 9, "task.outputs")
    for damage in (None, 4, None):
        if damage is not None:
            teacher.cache.path(damage).write_bytes(b"damaged")
        found = teacher(pixels, samples)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert sorted(file.name for file in (tmp_path / "kept").rglob("*.tokens")) == [
            "000000002.tokens",
            "000000004.tokens",
        ]
    black = torch.zeros_like(pixels[[0, 2]])
    assert torch.equal(teacher(black, samples[[0, 2]]).patches, expected.patches[[0, 2]])  # read, not computed
    assert not torch.equal(teacher(black).patches, expected.patches[[0, 2]])  # validation computes


@pytest.mark.parametrize("kind", ["whole", "masked", "sam"])
def test_distillation_flops_formula_agrees_with_torchs_counter(tmp_path: Path, kind: str) -> None:
    config = mae.MAEConfig(**STUDENT | {"width": 64}, mask_ratio=0.5)
    if kind == "sam":
        student, teacher = SamStudent(SAM), mae.SamEncoder(SAM.model_copy(update={"width": 64}))
    else:
        student = Student(config, 96, config if kind == "masked" else None)
        teacher = mae.Encoder(mae.MAEConfig(**STUDENT | {"width": 96}))
    images = torch.randn(2, 3, *student.config.image_size)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            target = encode(teacher.requires_grad_(False), images)
        student.imitate(images, target, torch.rand(2, 16)).backward()
    assert counter.get_total_flops() / 2 == pytest.approx(executed_distillation_flops(student, teacher), rel=0.02)
