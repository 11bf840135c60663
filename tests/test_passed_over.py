"""What pack makes of awkward sources: nothing vanishes in silence, and only one pack works on a folder."""

import io
import json
import os
import re
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.index.index import open_shards
from data.index.passed_over import BESIDE, BYTES, PassedOver
from data.index.samples import NO_NUMBER
from data.inspect.__main__ import main as inspect_command
from data.pack.image_folder import find_images
from data.pack.plan import hold
from tests.test_index import png, write_tar
from tests.test_pack import digests, image, pack, refused


def test_entries_of_a_folder_that_are_not_packed_are_counted_by_reason(tmp_path):
    source = tmp_path / "in"
    for name in ("cat/a.png", "dog/b.png", "cat/@eaDir/a.png/THUMB_XL.jpg", "cat/.cache/c.png", "cat/._a.png"):
        image(source / name)
    image(tmp_path / "elsewhere" / "e.png")
    (source / "cat" / "notes.txt").write_text("of no image")
    os.mkfifo(source / "cat" / "pipe.jpg")
    for link, target in (("cat/all", ".."), ("fox", "cat"), ("owl", tmp_path / "elsewhere"), ("eel", tmp_path)):
        (source / link).symlink_to(target)
    ended = pack(source, tmp_path / "out")
    assert ended.returncode == 0 and "3 samples in 1 shards, 3 classes" in ended.stdout, ended
    index = open_shards(tmp_path / "out")
    assert sorted(index.key(i) for i in range(3)) == ["cat/a", "dog/b", "owl/e"]
    reasons = (
        "2 hidden files and folders (cat/._a.png, cat/.cache)",
        "1 files and folders of thumbnails and waste (cat/@eaDir)",
        "3 links to folders that lead back or are packed already (cat/all, eel, fox)",
        "1 special files (cat/pipe.jpg)",
        "1 files that are neither images nor named after one (cat/notes.txt)",
    )
    assert all(reason in ended.stderr for reason in reasons), ended.stderr
    refused(pack(source, tmp_path / "strict", "--strict"), "--strict: passed over: ", *reasons)
    assert not list(tmp_path.glob("strict*"))


def test_inspect_shows_what_was_not_packed_and_what_is_not_read(tmp_path, capsys):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "notes.txt").write_text("of no image")
    assert pack(tmp_path / "in", tmp_path / "out").returncode == 0
    write_tar(tmp_path / "out" / "more.tar", {"b.png": png(), "lone.json": b"{}"})
    inspect_command([str(tmp_path / "out"), "--jobs", "1", "--json", str(tmp_path / "found.json")])
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert re.search(r"passed over +1 files without an image of their key \(lone.json\)", said)
    assert re.search(r"not packed +1 files that are neither images nor named after one \(notes.txt\)", said)
    assert [sum(entry["count"] for entry in found[name].values()) for name in ("passed_over", "not_packed")] == [1, 1]
    with pytest.raises(SystemExit):
        inspect_command([str(tmp_path / "out"), "--jobs", "1", "--strict"])


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train_images", "test_set")])
def test_sub_folders_called_after_a_split_and_more_are_no_classes(tmp_path, names):
    for name in names:
        image(tmp_path / "in" / name / "a.png")
    refused(
        pack(tmp_path / "in", tmp_path / "out"), "which is a split and no class", f"{tmp_path}/in/{min(names)} OUT/"
    )


def test_classes_whose_names_only_contain_a_split_are_classes(tmp_path):
    for name in ("bullet_train", "test_tube", "valley"):
        image(tmp_path / "in" / name / "a.png")
    assert pack(tmp_path / "in", tmp_path / "out").returncode == 0


def test_one_class_and_deeper_folders_are_said(tmp_path):
    for name in ("cat", "dog"):
        image(tmp_path / "in" / "images" / name / f"{name}.png")
    said = pack(tmp_path / "in", tmp_path / "out").stderr
    assert f"all images have one class, images: if the folders in it are the classes, pack {tmp_path}/in/images" in said
    assert "2 images lie deeper in the folder of their class" in said


def test_tars_called_after_classes_are_said_to_have_no_labels(tmp_path):
    for name in ("n01", "n02"):
        write_tar(
            tmp_path / "in" / f"{name}.tar",
            {f"{name}_{i}.png": image(tmp_path / "a.png").read_bytes() for i in range(2)},
        )
    ended = pack(tmp_path / "in", tmp_path / "out")
    assert (
        ended.returncode == 0 and "no sample has a label: if each of the 2 tars is a class, unpack each" in ended.stderr
    )


def test_name_that_is_not_utf8_leaves_the_pack_readable(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        image(tmp_path / "in" / "größe" / name)
    latin = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9"))
    image(latin / "c.png")
    (latin / "broken.png").write_bytes(b"")
    ended = pack(tmp_path / "in", tmp_path / "out")
    assert ended.returncode == 0 and "3 samples" in ended.stdout, ended
    inspect_command([str(tmp_path / "out"), "--jobs", "1"])
    written = (tmp_path / "out" / "manifest.json").read_text()
    assert json.loads(written)["bad"][0]["file"] == "caf\udce9/broken.png" and "größe" in written
    earlier = written.encode().replace(b"\\udce9", b"\xe9")  # as versions before wrote it
    (tmp_path / "out" / "manifest.json").write_bytes(earlier)
    inspect_command([str(tmp_path / "out"), "--jobs", "1"])
    capsys.readouterr().out.encode()


def test_out_inside_the_source_is_not_packed_when_the_command_is_repeated(tmp_path):
    source = tmp_path / "in"
    for i in range(6):
        image(source / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    assert pack(source, tmp_path / "out", "--name", "x", "--shard-size", 2).returncode == 0
    words = (source, source / "shards", "--name", "x", "--shard-size", 2)
    assert pack(*words, "--part", "1/2").returncode == 0  # leaves what an interruption leaves
    assert pack(*words).returncode == 0 and digests(source / "shards") == digests(tmp_path / "out")
    again = pack(*words, "--overwrite")
    assert (
        again.returncode == 0
        and digests(source / "shards") == digests(tmp_path / "out")
        and not again.stderr.count("passed")
    )
    refused(pack(source, tmp_path / "other"), "holds both tars")


def test_second_pack_into_the_same_folder_is_refused_while_the_first_works(tmp_path):
    image(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    with hold(out):
        refused(
            pack(tmp_path / "in", out), f"another pack works on {out}.partial (process {os.getpid()} of ", "Wait for it"
        )
        refused(pack(tmp_path / "in", out, "--overwrite"), "another pack works on")
    with hold(out, (1, 2)):
        assert pack(tmp_path / "in", out, "--part", "2/2").returncode == 0
        refused(pack(tmp_path / "in", out, "--part", "1/2"), f"(process {os.getpid()} of ")
        refused(pack(tmp_path / "in", out), "several parts of one")
        refused(pack(tmp_path / "in", out, "--merge"), "several parts of one")
    assert pack(tmp_path / "in", out).returncode == 0 and sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_pack_of_tars_with_several_images_needs_a_choice_and_keeps_all_members(tmp_path):
    colour, depth = image(tmp_path / "a.png").read_bytes(), image(tmp_path / "b.png", 9).read_bytes()
    files = {"a.depth.png": depth, "a.view.png": colour, "a.cls": b"3"}
    write_tar(tmp_path / "in.tar", files)
    refused(pack(tmp_path / "in.tar", tmp_path / "out"), "'a.depth.png' and 'a.view.png'", "--image in data.pack")
    assert pack(tmp_path / "in.tar", tmp_path / "out", "--image", "view.png").returncode == 0
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert found == files and next(iter(found)) == "a.view.png"
    assert open_shards(tmp_path / "out", image="depth.png").label(0) == 3


# Everything that is there is packed, passed over or refused

ENDINGS = st.sampled_from(["png", "jpg", "cls", "json", "seg.png", "PNG", "tar", "", "a.b"])
STEMS = st.sampled_from(["a", "b", "a b", "ö", "2019", ".h", "@eaDir/t", "c/a", "c/d/b", "__MACOSX/._a"])
CONTENTS = st.sampled_from([b"", png(), b"3", b"cat", b"2.0", b"{}"])
MEMBERS = st.lists(
    st.tuples(STEMS, ENDINGS, CONTENTS, st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.FIFOTYPE])),
    max_size=12,
)
NO_MEMBERS = {BYTES, BESIDE, NO_NUMBER, "keys that occur again, each as a sample of its own"}


def count(passed_over: PassedOver) -> int:
    return sum(number for reason, number in passed_over.counts.items() if reason not in NO_MEMBERS)


def archive(members: list[tuple[str, str, bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for stem, ending, contents, kind in members:
            info = tarfile.TarInfo(f"{stem}.{ending}" if ending else stem)
            info.type, info.size, info.linkname = kind, len(contents) if kind == tarfile.REGTYPE else 0, "a.png"
            tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


def check_tar(members: list, more: list, rest: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.tar").write_bytes(archive(members) + (archive(more) if more else b"") + rest)
        try:
            index = open_shards(f"{folder}/x.tar", image="first")
        except DataError as error:
            assert "x.tar" in str(error)
            return
        names = [[member.name for member in index.members(sample)] for sample in range(len(index))]
        offsets = {member.offset for sample in range(len(index)) for member in index.members(sample)}
        assert len(offsets) + count(index.passed_over) == len(members) + len(more)
        assert index.passed_over.counts.get(BYTES, 0) == len(rest)
        for sample, found in enumerate(names):
            labels = [name for name in found if name.lower().endswith(".cls")]
            assert index.label(sample) < 0 or labels
        again = open_shards(f"{folder}/x.tar", image="first")  # from its file
        assert str(again.passed_over) == str(index.passed_over) and again.fingerprint == index.fingerprint


def check_folder(members: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entries = set()
        for stem, ending, contents, kind in members:
            path = Path(folder, "in", f"{stem}.{ending}" if ending else stem)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == tarfile.SYMTYPE:
                    path.symlink_to(f"{folder}/in")
                elif not path.exists():
                    os.mkfifo(path) if kind == tarfile.FIFOTYPE else path.write_bytes(contents)
            except OSError:  # The name is one of a file, or of a folder, already.
                continue
            hidden = [part for part in path.relative_to(f"{folder}/in").parts if part.startswith((".", "@", "__"))]
            # A folder that is not looked into counts once.
            entries.add(str(path).partition(f"/{hidden[0]}")[0] + f"/{hidden[0]}" if hidden else str(path))
        passed_over = PassedOver()
        try:
            samples, _, _ = find_images(Path(folder, "in"), None, passed_over)
        except DataError as error:
            assert folder in str(error)
            return
        packed = sum(1 + len(sample.others) for sample in samples)
        assert packed + count(passed_over) == len(entries), (entries, str(passed_over))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS, more=MEMBERS, rest=st.sampled_from([b"", b"?" * 700]))
def test_members_of_any_tar_are_samples_passed_over_or_refused(members, more, rest):
    check_tar(members, more, rest)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS)
def test_entries_of_any_folder_are_samples_passed_over_or_refused(members):
    check_folder(members)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS, more=MEMBERS, rest=st.sampled_from([b"", b"?" * 700]))
def test_many_trees_and_tars_lose_nothing(members, more, rest):
    check_tar(members, more, rest)
    check_folder(members)
