"""Strategies: data-parallel copies of the model (DDP) or shards of it (FSDP), with the same checkpoint files."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mae.errors import ConfigError
from mae.run.checkpoint_files import read


def choose_strategy(name: str, ranks: int, precision: str, timeout: timedelta) -> str | Strategy:
    """Returns the strategy of `trainer.strategy`: "auto" (one device, or DDP), "ddp", "fsdp", or a name of Lightning's.

    timeout  of a collective

    Raises ConfigError if the precision is not available with FSDP.
    """
    if name == "ddp" or (name == "auto" and ranks > 1):
        return DDP(find_unused_parameters=False, gradient_as_bucket_view=True, timeout=timeout)
    if name == "fsdp":
        if precision == "16-mixed":
            raise ConfigError(
                "precision=16-mixed is not available with trainer.strategy=fsdp: set precision=bf16-mixed or "
                "trainer.strategy=ddp"
            )
        return FSDP(ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)
    return name


class DDP(DDPStrategy):
    """DDP with the same gradient buckets in every step, also in the first after a restart.

    DDP first lays its buckets out in the order of the parameters, and after the first backward pass anew, in the order
    in which gradients arrived. With three or more ranks the layout decides the order of summation, so that the first
    step after a restart would differ in the last bits. A backward pass before the first step leaves the second layout
    only, of as many images as the steps have: compiled blocks are of one size. (`static_graph=True` delays the new
    layout by a step, and failed with accumulation when tried on torch 2.15.)
    """

    def on_train_start(self) -> None:
        super().on_train_start()
        module = cast(Any, self.lightning_module)
        cast(Any, self.training_step(module.blank_batch(module.schedule.micro_batch), 0))["loss"].backward()
        module.zero_grad()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Maps the file: ranks of a machine share its pages, and none holds it whole."""
        return read(Path(checkpoint_path))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.root_device.type == "cpu":  # there the optimiser keeps the tensors that it is given
            states = apply_to_collection(checkpoint["optimizer_states"], Tensor, Tensor.clone)
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)


class FSDP(ModelParallelStrategy):
    """FSDP2 with the checkpoints of one device: whole tensors under the same names, in one file.

    Saving, rank 0 gathers the tensors one by one. Loading, every rank maps the file and copies its own rows.
    """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._gather_to_rank_zero(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._gather_to_rank_zero(Strategy.optimizer_state(self, optimizer))

    def _gather_to_rank_zero(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(tensor: DTensor) -> Tensor | None:
            whole = tensor.full_tensor()
            return whole.cpu() if self.is_global_zero else None

        return apply_to_collection(state, DTensor, gather)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        stored = {name: _local_rows(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(stored, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = {
                name: parameter
                for group in optimizer.param_groups
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
            }
            state = {
                name: {key: _local_rows(value, own.get(name)) for key, value in entry.items()}
                for name, entry in stored["state"].items()
            }
            optimizer.load_state_dict(stored | {"state": state})


def _local_rows(whole: Tensor, like: Tensor | None) -> Tensor:
    """Copies this rank's rows of a tensor if `like` is sharded and has its shape, else the whole tensor."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole.clone()
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Any,
    entrances: Sequence[str] = (),
    reshard: bool | None = None,
) -> None:
    """Shards the parameters over the ranks of `mesh` in place: each block on its own, the rest together.

    blocks     those whose `forward` is called
    entrances  further methods through which the model is called, beside `forward`
    reshard    free what lies outside the blocks after the forward pass too; None: only the blocks
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    for name in entrances:
        register_fsdp_forward_method(model, name)
