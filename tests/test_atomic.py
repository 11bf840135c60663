"""A file is replaced whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mae.atomic import write_atomically


@pytest.mark.parametrize("before", ["old", None], ids=["replaces a file", "new file"])
def test_failing_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file.json"
    if before is not None:
        path.write_text(before)

    with pytest.raises(OSError, match="disk full"), write_atomically(path) as temporary:
        temporary.write_text("half of the new")
        raise OSError("disk full")

    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before is not None else [])


def test_write_is_synced_before_the_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced, fsync = tmp_path / "file.json", [], os.fsync
    path.write_text("old")

    def record(descriptor: int) -> None:
        synced.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", path.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"

    assert synced == [("file", "old"), ("folder", "new")]
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with write_atomically(path) as first, write_atomically(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_write_succeeds_on_a_file_system_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems answer EINVAL; when the folder is synced, the new file is in place."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO if stat.S_ISDIR(os.fstat(descriptor).st_mode) else errno.EINVAL, "")

    monkeypatch.setattr(os, "fsync", refuse)
    with write_atomically(tmp_path / "file.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file.json").read_text() == "new"
