"""What only a GPU can show (make test-gpu): each task trains, resumes to the bit, and computes what a CPU computes."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mae
from mae.distributed.launch import Topology
from mae.models.noise import uniform_noise
from mae.run.checkpoint_files import checkpoints
from mae.run.metrics import read_metrics
from mae.sam.encoder import Block, SamConfig, SamEncoder
from mae.sam.kernels import IN_PLACE, KERNELS
from mae.train.optim import OptimConfig, build_optimizer
from tasks.train import train
from tests.exports import own_checkpoint
from tests.masked_photos import shards_of_shapes
from tests.poisoned_run import Poison
from tests.processes import SMALL, assert_same_run, command, losses, run
from tests.test_experiments import compose
from tests.test_segment import SMALL as SEGMENT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # compilation in this process warns of what is not ours
]

ONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
GPU = "trainer.accelerator=gpu"
PLAIN = ("val_every=null", "data.workers=0", "max_steps=6")
RECIPES = {
    "bf16-mixed": ("precision=bf16-mixed",),
    "deterministic": ("precision=bf16-mixed", "trainer.deterministic=true"),
    "16-mixed, muon": ("precision=16-mixed", "optim=muon", "optim.grad_clip=1"),
    "compiled": ("precision=bf16-mixed", "blocks.compile=true"),
}


def trained(runs: Path, root: Path, name: str, *overrides: str, callbacks: tuple = ()) -> Path:
    """Trains a small model in this process, on the GPU unless the overrides say otherwise."""
    config = compose(f"runs={runs}", f"data.root={root}", f"name={name}", *SMALL, *PLAIN, GPU, *overrides)
    train(config, ONE, callbacks)
    return config.run


def losses_of(folder: Path) -> list[float]:
    return [float(row["train/loss"]) for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_steps_of_a_task_on_a_gpu_have_the_losses_of_a_cpu(tmp_path: Path, built_in: Path, task: str) -> None:
    words = [
        f"task={task}",
        "precision=32-true",
        *(["optim=finetune", "task.drop_path=0"] if task == "finetune" else []),
    ]
    expected = losses_of(trained(tmp_path, built_in, "cpu", *words, "trainer.accelerator=cpu"))
    found = losses_of(trained(tmp_path, built_in, "gpu", *words))
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=2e-3)


def test_distillation_on_a_gpu_has_the_losses_of_a_cpu(tmp_path: Path, built_in: Path) -> None:
    words = ["task=distill", f"task.teacher={own_checkpoint(tmp_path)[1]}", "task.mask_ratio=0.5", "precision=32-true"]
    expected = losses_of(trained(tmp_path, built_in, "cpu", *words, "trainer.accelerator=cpu"))
    found = losses_of(trained(tmp_path, built_in, "gpu", *words))
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=2e-3)


def test_segmentation_trains_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    photographs = shards_of_shapes(tmp_path / "shapes", train=8, val=2)
    words = [f"runs={tmp_path}", f"data.path={photographs}", "data.workers=0", "name=run", *SEGMENT]
    config = compose(*words, GPU, "precision=bf16-mixed", "max_steps=4", "val_every=4", "blocks.recompute=all")
    train(config, ONE)
    assert all(0 < loss < 100 for loss in losses_of(config.run))


def test_non_finite_step_leaves_the_weights_on_a_gpu(tmp_path: Path, built_in: Path) -> None:
    poison = Poison({1, 4})
    trained(tmp_path, built_in, "poisoned", callbacks=(poison,))
    assert [step for step in range(1, 6) if poison.learnt[step] == poison.learnt[step - 1]] == [1, 4]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_resumed_run_on_a_gpu_is_equal_to_the_bit(tmp_path: Path, built_in: Path, recipe: tuple[str, ...]) -> None:
    words = command(tmp_path, built_in, *PLAIN, GPU, *recipe, "name=run", "max_steps=8", "checkpoint.every_steps=4")
    run(words)
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    checkpoints(tmp_path / "run")[0].unlink()
    (tmp_path / "run" / "summary.json").unlink()

    assert "step-00000004.ckpt" in run(words).replace("\n", "")

    assert_same_run(tmp_path / "run", whole)


def test_checkpoint_of_fsdp_on_a_gpu_goes_on_under_ddp(tmp_path: Path, built_in: Path) -> None:
    settings = (*PLAIN, GPU, "precision=32-true", "max_steps=8", "checkpoint.every_steps=4")
    run(command(tmp_path, built_in, *settings, "name=ddp", "trainer.strategy=ddp"))
    run(command(tmp_path, built_in, *settings, "name=both", "trainer.strategy=fsdp"))
    checkpoints(tmp_path / "both")[0].unlink()
    (tmp_path / "both" / "summary.json").unlink()

    run(command(tmp_path, built_in, *settings, "name=both", "trainer.strategy=ddp"))

    expected, found = losses(tmp_path / "ddp"), losses(tmp_path / "both")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-4), key


def test_pinned_batches_under_accumulation_give_the_losses_of_no_workers(tmp_path: Path, built_in: Path) -> None:
    """A batch of the ring that is written again while it is still copied would change them by more than rounding."""
    settings = (*PLAIN, GPU, "precision=32-true", "micro_batch=8", "max_steps=30")
    run(command(tmp_path, built_in, *settings, "name=none"))
    run(command(tmp_path, built_in, *settings, "name=two", "data.workers=2"))
    two, none = losses(tmp_path / "two"), losses(tmp_path / "none")
    assert two.keys() == none.keys()
    assert [float(two[at]) for at in two] == pytest.approx([float(none[at]) for at in two], rel=1e-5)


def test_compiled_and_16_bit_runs_stay_near_float32(tmp_path: Path, built_in: Path) -> None:
    expected = losses_of(trained(tmp_path, built_in, "float32", "precision=32-true"))
    for name, words in {
        "compiled": ("precision=32-true", "blocks.compile=true"),
        "half": ("precision=16-mixed",),
        "bf16": ("precision=bf16-mixed",),
    }.items():
        assert losses_of(trained(tmp_path, built_in, name, *words)) == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("masking", ["random", "grid", "block"])
def test_pretraining_step_never_waits_for_the_gpu(masking: str) -> None:
    config = mae.MAEConfig.model_validate(
        {"image_size": 64, "patch_size": 8, "width": 64, "depth": 2, "num_heads": 2, "masking": masking}
        | {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    )
    model = mae.MaskedAutoencoder(config).cuda()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig.model_validate({}), 1e-4)
    images, rows = torch.randn(4, 3, 64, 64, device="cuda"), torch.arange(4, device="cuda")

    def step(number: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, uniform_noise(0, number, rows, config.patches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Attention of the SAM-style encoder: windows at the edge, and a global block.
SAM = SamConfig(image_size=(288, 256), width=160, depth=2, num_heads=2, window=14, global_blocks=(1,))


def sam(kernel: str | None) -> tuple[SamEncoder, Tensor]:
    """Returns the same encoder with no weights at zero each time, and images."""
    torch.manual_seed(0)
    encoder = SamEncoder(SAM)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim == 4 else 0.1))
    for block in encoder.blocks:
        assert isinstance(block, Block)
        block.attn.kernel = kernel
    return encoder, torch.randn(2, 3, *SAM.image_size)


def gradients(encoder: nn.Module) -> Tensor:
    """Returns all gradients in one vector, on the CPU."""
    return torch.cat([parameter.grad.flatten().float().cpu() for parameter in encoder.parameters()])


def exact_convolutions() -> AbstractContextManager[None]:
    """Keeps TF32, which is torch's default in convolutions, out of float32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float().cpu() - expected.detach()).norm() / expected.detach().norm())


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor]:
    """Embedding and gradients of the CPU in float32."""
    encoder, images = sam(None)
    embedding = encoder(images)
    embedding.square().mean().backward()
    return embedding, gradients(encoder)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [None, *KERNELS])
def test_sam_on_a_gpu_trains_as_on_a_cpu(kernel: str | None, bf16: bool, reference: tuple[Tensor, Tensor]) -> None:
    if kernel == "flex" and not bf16:
        pytest.skip("no tile of float32 fits")
    encoder, images = sam(kernel)
    encoder.cuda()
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        torch.autocast("cuda", torch.bfloat16, enabled=bf16),
    ):
        embedding = encoder(images.cuda())
        embedding.float().square().mean().backward()
    assert apart(embedding, reference[0]) <= (2e-2 if bf16 else 1e-4)
    assert apart(gradients(encoder), reference[1]) <= (5e-2 if bf16 else 1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernel", [None, IN_PLACE])
@torch.inference_mode()
def test_sam_on_a_gpu_embeds_as_on_a_cpu(kernel: str | None, compiled: bool, reference: tuple[Tensor, Tensor]) -> None:
    encoder, images = sam(kernel)
    encoder.cuda().bfloat16()
    if compiled:
        encoder.compile_blocks()
    for count in (2, 1):  # a second size of batch, as a user's last batch has
        embedding = encoder(images[:count].cuda().bfloat16())
        assert apart(embedding, reference[0][:count]) <= 2e-2


@torch.inference_mode()
def test_sam_kernel_in_place_is_exact_in_float32(reference: tuple[Tensor, Tensor]) -> None:
    encoder, images = sam(IN_PLACE)
    with exact_convolutions():
        assert apart(encoder.cuda()(images.cuda()), reference[0]) <= 1e-4
