"""Shared batches: written again only when nobody holds them."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader.shared_batches import Ring


def ring() -> Ring:
    return Ring(2, (4, 3, 2, 2), np.uint8)


def filled(ring: Ring, value: int, count: int = 4) -> torch.Tensor:
    slot = ring.lend()
    assert slot is not None
    ring.slot(slot, count).fill_(value)
    return ring.hand_out(slot, count)


def test_slot_is_free_once_its_last_view_is_gone():
    shared = ring()
    one, two = filled(shared, 1), filled(shared, 2)
    assert shared.lend() is None
    part = one[1:3].flatten(1)
    del one
    gc.collect()
    assert shared.lend() is None and (part == 1).all() and (two == 2).all()
    del part
    gc.collect()
    slot = shared.lend()
    assert slot is not None and (two == 2).all()


def test_take_back_frees_the_slots_lent_to_a_broken_off_iteration():
    shared = ring()
    held, _ = filled(shared, 1), shared.lend()
    assert shared.lend() is None
    shared.take_back()
    assert shared.lend() is not None and shared.lend() is None and (held == 1).all()


def test_smaller_batch_takes_the_first_rows_of_a_slot():
    shared = ring()
    slot = shared.lend()
    assert slot is not None
    shared.slot(slot, 3).fill_(7)
    assert shared.hand_out(slot, 3).shape == (3, 3, 2, 2)


class Runtime:
    """Stands for the CUDA runtime: which addresses are pinned, and whether they were mapped when they were unpinned."""

    def __init__(self) -> None:
        self.pinned: set[int] = set()
        self.mapped: list[bool] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        self.mapped.append(any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges))
        return 0


def test_memory_is_unpinned_before_it_is_unmapped_and_not_while_a_batch_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    shared = ring()
    held = filled(shared, 1)
    shared.pin()
    shared.pin()
    assert len(runtime.pinned) == 1
    del shared
    gc.collect()
    assert len(runtime.pinned) == 1 and (held == 1).all()
    del held
    gc.collect()
    assert not runtime.pinned and runtime.mapped == [True]


@pytest.mark.gpu
def test_memory_of_a_ring_that_is_gone_can_be_copied_to_a_gpu() -> None:
    torch.zeros((), device="cuda")
    for _ in range(20):
        shared = Ring(2, (64, 3, 64, 64), np.uint8)
        shared.pin()
        expected = filled(shared, 5, 64)
        assert torch.equal(expected.cuda().cpu(), expected)
        del shared, expected
        gc.collect()
        fresh = torch.ones(3 << 20)  # of the size of a mapping, where the ring was
        assert fresh.cuda().sum() == 3 << 20
