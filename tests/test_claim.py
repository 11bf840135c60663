"""What is made once for everybody is made by one process, on whatever machine; the others wait, and replace nothing."""

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.index import build, index_file
from data.index.__main__ import main
from data.index.index import open_shards
from data.pack import builtin
from data.storage import claim as claims
from data.storage.claim import claim
from tests.machines import on_machines
from tests.test_index import shard


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW_SECONDS", 0.05), ("DEAD_SECONDS", 0.4), ("POLL_SECONDS", 0.02)):
        monkeypatch.setattr(claims, name, seconds)


def test_claim_is_held_by_one_at_a_time_and_removed_at_the_end(tmp_path: Path, fast: None) -> None:
    inside, most = [], []

    def work() -> None:
        with claim(f"{tmp_path}/x"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8 and not os.listdir(tmp_path)


@pytest.mark.parametrize("seconds", [0, 1 << 33])
def test_claim_of_a_dead_process_is_taken_whatever_its_clock_says(tmp_path: Path, fast: None, seconds: int) -> None:
    (tmp_path / "x.claim").write_text("process 7 of node3")
    os.utime(tmp_path / "x.claim", (seconds, seconds))
    began = time.monotonic()
    with claim(f"{tmp_path}/x"):
        assert time.monotonic() - began > 0.4
    assert not os.listdir(tmp_path)


def test_claim_is_waited_for_as_long_as_it_grows(tmp_path: Path, fast: None) -> None:
    order = []

    def wait() -> None:
        with claim(f"{tmp_path}/x"):
            order.append("second")

    with claim(f"{tmp_path}/x"):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.0)  # longer than what makes a claim dead
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_holder_that_was_taken_for_dead_leaves_the_claim_of_its_successor(tmp_path: Path) -> None:
    with claim(f"{tmp_path}/x"):
        (tmp_path / "x.claim").write_text("process 8 of node4")
    assert (tmp_path / "x.claim").read_text() == "process 8 of node4"


def test_work_begins_at_once_where_no_claim_can_be_written(tmp_path: Path) -> None:
    with claim(f"{tmp_path}/absent/x"):
        assert not os.listdir(tmp_path)


# The first read of shared data


def test_each_shard_is_indexed_by_one_of_all_ranks_of_several_machines(tmp_path: Path, monkeypatch) -> None:
    shared = tmp_path / "shared"
    for number in range(12):
        shard(shared / f"x{number:02d}.tar", number + 1)
    (shared / "x03.idx.claim").write_text("process 7 of node3, which has died")
    monkeypatch.setattr(claims, "DEAD_SECONDS", 0.5)
    built, build_index = tmp_path / "built", build._build

    def slowly(tar: Any) -> Any:
        with open(built, "a") as file:
            file.write(f"{Path(tar.path).name}\n")
        time.sleep(0.02)
        return build_index(tar)

    monkeypatch.setattr(build, "_build", slowly)
    answers = on_machines(4, shared, lambda number, folder: (open_shards(folder).fingerprint, len(open_shards(folder))))

    assert set(answers) == {(open_shards(shared).fingerprint, 78)}
    assert Counter(built.read_text().split()) == {f"x{number:02d}.tar": 1 for number in range(12)}
    assert {path.suffix for path in shared.iterdir()} == {".tar", ".idx", ".bin"}


def test_ranks_begin_at_shards_of_their_own_and_keep_the_order(tmp_path: Path, monkeypatch) -> None:
    tars = [str(shard(tmp_path / f"x{number}.tar")) for number in range(6)]
    began: list[str] = []
    monkeypatch.setattr(build, "_build", lambda tar, build=build._build: began.append(tar.path) or build(tar))
    for variables, first in (({"RANK": "1", "WORLD_SIZE": "3"}, 2), ({"SLURM_PROCID": "5", "SLURM_NTASKS": "7"}, 4)):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            for path in tmp_path.glob("*.idx*"):
                path.unlink()
            began.clear()
            assert open_shards(tmp_path).shards == tars
            assert began == tars[first:] + tars[:first]


def test_index_that_holds_the_same_already_is_not_replaced(tmp_path: Path, capsys) -> None:
    tar = shard(tmp_path / "x.tar")
    open_shards(tar)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    main([str(tar)])  # indexes anew, while a run may have mapped the tables
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before

    (tmp_path / "x.idx").write_text("v1.2 0\n")
    main([str(tar)])
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert [name for name in before if after[name] != before[name]] == ["x.idx"]
    assert open_shards(tar).key(2) == "x_002"


def test_index_that_goes_to_the_cache_is_said_with_the_way_to_have_it_beside_the_shards(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))
    folder = shard(tmp_path / "fixed" / "x.tar").parent
    folder.chmod(0o555)
    try:
        open_shards(folder)
        said = capsys.readouterr().err
        assert f"the indexes of {folder} are in {tmp_path / 'cache'}" in said and f"data.index {folder}`" in said
        open_shards(folder)
        assert "the indexes of" not in capsys.readouterr().err
    finally:
        folder.chmod(0o755)
    assert not list(Path(index_file.cache_root()).rglob("*.claim"))


def test_built_in_images_are_packed_by_one_of_several_machines(tmp_path: Path, monkeypatch) -> None:
    packed, make = tmp_path / "packed", builtin._make_digits

    def note(copies: int = 0) -> Any:
        with open(packed, "a") as file:
            file.write("x")
        return make(copies)

    monkeypatch.setattr(builtin, "_make_digits", note)
    shared = tmp_path / "shared"
    shared.mkdir()
    on_machines(3, shared, lambda number, folder: builtin.ensure("digits", folder))
    assert packed.read_text() == "x"
    assert os.listdir(shared / "built_in") == ["digits"]
    assert len(open_shards(shared / "built_in" / "digits", "train")) == 1438
