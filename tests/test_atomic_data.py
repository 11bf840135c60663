"""A file or folder of data/ has its name only when it is complete and on the disk."""

import errno
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from data.atomic import publish, replace_file

MEGABYTE = 1 << 20


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Records what is passed to os.fsync, in order: file or folder, and its inode."""
    calls: list[tuple[str, int]] = []
    fsync = os.fsync

    def record(file: int) -> None:
        state = os.fstat(file)
        calls.append(("folder" if stat.S_ISDIR(state.st_mode) else "file", state.st_ino))
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    return calls


def test_file_has_its_name_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "index"

    with replace_file(path) as file:
        file.write(b"all of it")
        file.flush()
        assert not path.exists()

    assert path.read_bytes() == b"all of it" and os.listdir(tmp_path) == ["index"]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, "old"])
def test_failing_writer_leaves_the_old_contents_and_nothing_else(
    tmp_path: Path, failure: BaseException, before: str | None
) -> None:
    path = tmp_path / "index"
    if before:
        path.write_text(before)

    with pytest.raises(type(failure)), replace_file(path, "w") as file:
        file.write("half")
        raise failure

    assert [entry.read_text() for entry in tmp_path.iterdir()] == ([before] if before else [])


def test_file_is_flushed_before_the_rename_and_its_folder_after(
    tmp_path: Path, flushed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "index", os.replace

    def record(source: str, target: Path) -> None:
        flushed.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    with replace_file(path) as file:
        file.write(b"contents")

    inode = path.stat().st_ino
    assert flushed == [("file", inode), ("rename", inode), ("folder", tmp_path.stat().st_ino)]


def test_publish_flushes_the_folder_and_its_parent(tmp_path: Path, flushed: list[tuple[str, int]]) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "manifest.json").write_text("{}")

    publish(tmp_path / "out.partial", tmp_path / "out")

    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["manifest.json"]
    assert flushed == [("folder", (tmp_path / "out").stat().st_ino), ("folder", tmp_path.stat().st_ino)]


def test_relative_path_is_replaced_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with replace_file("index") as file:
        file.write(b"contents")

    assert (tmp_path / "index").read_bytes() == b"contents"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask_as_with_open(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        (tmp_path / "opened").touch()
        with replace_file(tmp_path / "replaced"):
            pass
    finally:
        os.umask(previous)

    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "opened").stat().st_mode


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_folder_flush_errors_are_ignored_only_where_flushing_is_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raises: bool
) -> None:
    fsync = os.fsync

    def refuse_folders(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(file)

    def write() -> None:
        with replace_file(tmp_path / "index") as file:
            file.write(b"contents")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if raises:
        with pytest.raises(OSError, match=os.strerror(code)):
            write()
    else:
        write()
    assert os.listdir(tmp_path) == ["index"]


def write_often(path: Path, letter: bytes) -> None:
    for _ in range(20):
        with replace_file(path) as file:
            for _ in range(4):
                file.write(letter * (MEGABYTE // 4))


def test_several_processes_replace_one_file_and_readers_see_it_whole(tmp_path: Path) -> None:
    path, context = tmp_path / "index", multiprocessing.get_context("spawn")
    write_often(path, b"a")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in (b"b", b"c")]
    for writer in writers:
        writer.start()

    while any(writer.is_alive() for writer in writers):
        contents = path.read_bytes()
        assert contents == contents[:1] * MEGABYTE

    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["index"] and path.read_bytes()[:1] in (b"b", b"c")
