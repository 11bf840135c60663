"""Shared batches: written again only when nobody holds them."""

import gc

import numpy as np
import torch

from data.loader.shared_batches import Ring


def ring() -> Ring:
    return Ring(2, (4, 3, 2, 2), np.uint8)


def filled(ring: Ring, value: int) -> torch.Tensor:
    slot = ring.lend()
    assert slot is not None
    ring.slot(slot, 4).fill_(value)
    return ring.hand_out(slot, 4)


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
