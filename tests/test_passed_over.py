"""What pack makes of awkward sources: nothing vanishes in silence, and only one pack works on a folder."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.index.__main__ import unpack
from data.index.index import open_shards
from data.index.passed_over import BESIDE, BYTES, ZEROS, PassedOver
from data.index.samples import NO_NUMBER
from data.inspect.__main__ import main as inspect_command
from data.pack.image_folder import find_images
from data.pack.plan import PackPlan, begin_pack, hold
from tests.conftest import ROOT
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


def test_class_called_train_among_others_is_a_class_and_said(tmp_path):
    for name in ("car", "train", "tram"):
        image(tmp_path / "in" / name / "a.png")
    source = find_images(tmp_path / "in")
    assert source.classes == ["car", "train", "tram"] and "folder train is taken for a class" in source.note


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


def test_files_beside_tars_are_counted_wherever_they_lie(tmp_path):
    data = image(tmp_path / "a.png").read_bytes()
    write_tar(tmp_path / "in" / "x.tar", {"a.png": data})
    write_tar(tmp_path / "in" / "more" / "y.tar", {"b.png": data})
    image(tmp_path / "in" / "raw" / "cat" / "c.png")
    (tmp_path / "in" / "x.idx").write_text("")
    (tmp_path / "in" / "z.json").write_bytes(b"")
    ended = pack(tmp_path / "in", tmp_path / "out")
    assert "1 samples" in ended.stdout
    assert "passed over: 3 files beside the tars (more/y.tar, z.json, raw/cat/c.png)" in ended.stderr


def test_images_named_after_another_one_are_said_to_be_samples_of_their_own(tmp_path):
    for name in ("c/a.jpg", "c/a.seg.png", "c/2019.10.jpg"):
        image(tmp_path / "in" / name)
    ended = pack(tmp_path / "in", tmp_path / "out")
    assert "3 samples" in ended.stdout and "1 images are named after another one, such as c/a.seg.png" in ended.stderr


def test_choice_of_an_image_for_a_folder_of_images_is_refused(tmp_path):
    image(tmp_path / "in" / "a.png")
    refused(pack(tmp_path / "in", tmp_path / "out", "--image", "png"), "--image png is for tars")


def test_listed_image_in_a_folder_of_thumbnails_is_refused(tmp_path):
    image(tmp_path / "@eaDir" / "a.png")
    (tmp_path / "list.csv").write_text("path\n@eaDir/a.png\n")
    refused(pack(tmp_path / "list.csv", tmp_path / "out"), "line 2: '@eaDir/a.png' lies in a folder of thumbnails")


def test_file_too_large_to_be_read_at_once_is_left_out_by_name(tmp_path, monkeypatch):
    for name in ("a", "b"):
        image(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "b.mp4").write_bytes(bytes(5000))
    write_tar(tmp_path / "x.tar", {"a.png": png(), "a.mp4": bytes(5000)})
    monkeypatch.setattr("data.storage.read.MAX_BYTES", 4000)
    ended = pack(tmp_path / "in", tmp_path / "out")
    assert "1 samples" in ended.stdout and "b.mp4: 5,000 bytes are above the limit of 4,000" in ended.stderr
    refused(pack(tmp_path / "x.tar", tmp_path / "out2"), "x.tar: 5,000 bytes are above the limit of 4,000")


def test_inspect_counts_what_pack_could_not_read(tmp_path, capsys):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    assert pack(tmp_path / "in", tmp_path / "out").returncode == 0
    with pytest.raises(SystemExit):
        inspect_command([str(tmp_path / "out"), "--jobs", "1", "--strict"])
    assert re.search(r"not packed +1 unreadable images \(b.png\)", capsys.readouterr().out)


def test_out_that_is_a_link_or_the_present_folder_is_filled(tmp_path, monkeypatch):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/big")
    assert pack(tmp_path / "in", tmp_path / "out").returncode == 0
    assert (tmp_path / "out").is_symlink() and os.listdir(tmp_path / "disk") == ["big"]
    assert (tmp_path / "disk" / "big" / "out-000000.tar").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pack(tmp_path / "in", ".").returncode == 0 and (tmp_path / "here" / "here-000000.tar").exists()


def test_folder_that_pack_did_not_make_is_neither_replaced_nor_removed(tmp_path):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.txt").write_text("precious")
    refused(pack(tmp_path / "in", tmp_path / "out"), "out.replaced is no packed data set")
    assert (tmp_path / "out.replaced" / "thesis.txt").exists()
    assert pack(tmp_path / "in", tmp_path / "mine").returncode == 0
    image(tmp_path / "mine" / "raw" / "a.png")
    refused(pack(tmp_path / "mine" / "raw", tmp_path / "mine", "--overwrite"), "holds raw, which no pack has written")
    # Another pack may have finished while this one was reading its source.
    plan = PackPlan("x", 0, 10, None, None, 1, [], "")
    (tmp_path / "other" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="other exists already"), hold(tmp_path / "other"):
        begin_pack(plan, tmp_path / "other", shared=False, overwrite=False)


def test_text_is_utf8_in_any_locale(tmp_path):
    script = (
        "from data.atomic import replace_file\n"
        "with replace_file('x.txt', 'w', errors='backslashreplace') as file: file.write('gr\\xf6\\xdfe')"
    )
    environment = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.txt").read_bytes().decode() == "größe"


# Everything that is there is packed, passed over or refused

ENDINGS = st.sampled_from(["png", "png", "jpg", "cls", "json", "seg.png", "PNG", "tar", "", "a.b"])
STEMS = st.sampled_from(
    [
        "a",
        "A",
        "b",
        "b",
        "a b",
        "a_b",
        "ö",
        "o\u0308",
        "caf\udce9",
        "2019",
        ".h",
        "@eaDir/t",
        "./e",
        "c/a",
        "c/d/b",
        "n" * 120,
    ]
)
CONTENTS = st.sampled_from([b"", png(), png(), b"3", b"cat", b"2.0", b"{}"])
KINDS = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
MEMBERS = st.lists(st.tuples(STEMS, ENDINGS, CONTENTS, KINDS), max_size=8)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
RESTS = st.sampled_from([b"", b"?" * 700, bytes(40_000)])
NO_MEMBERS = {BYTES, ZEROS, BESIDE, NO_NUMBER, "keys that occur again, each as a sample of its own"}


def count(passed_over: PassedOver) -> int:
    return sum(number for reason, number in passed_over.counts.items() if reason not in NO_MEMBERS)


def full_name(stem: str, ending: str) -> str:
    return f"{stem}.{ending}" if ending else stem


def archive(members: list[tuple[str, str, bytes, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for stem, ending, contents, kind in members:
            info = tarfile.TarInfo(full_name(stem, ending))
            info.type, info.size, info.linkname = kind, len(contents) if kind == tarfile.REGTYPE else 0, "a.png"
            tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


def check_tar(members: list, more: list, rest: bytes, form: int, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = archive(members, form) + (archive(more, form) if more else b"") + rest
        Path(folder, "x.tar.gz" if packed else "x.tar").write_bytes(gzip.compress(whole, 1) if packed else whole)
        try:
            tar = unpack(f"{folder}/x.tar.gz", folder) if packed else f"{folder}/x.tar"
            index = open_shards(tar, image="first")
        except DataError as error:
            assert "x.tar" in str(error)
            return
        files = Counter(
            (full_name(stem, ending), contents)
            for stem, ending, contents, kind in members + more
            if kind == tarfile.REGTYPE
        )
        used = {member for sample in range(len(index)) for member in index.members(sample)}
        assert not Counter((name, whole[offset : offset + size]) for name, offset, size in used) - files
        assert len(used) + count(index.passed_over) == sum(kind != tarfile.DIRTYPE for *_, kind in members + more)
        assert index.passed_over.counts.get(BYTES, 0) == (len(rest) if rest.strip(b"\0") else 0)
        assert (ZEROS in index.passed_over.counts) == (rest == bytes(40_000))
        for sample in range(len(index)):
            labels = [member for member in index.members(sample) if member.name.lower().endswith(".cls")]
            assert index.label(sample) < 0 or labels
        again = open_shards(tar, image="first")  # from its file
        assert str(again.passed_over) == str(index.passed_over) and again.fingerprint == index.fingerprint


def write_tree(source: Path, members: list) -> set[str]:
    """Writes files, links, folders and pipes; returns all entries, of a folder that is not looked into itself alone."""
    entries: set[str] = set()
    source.mkdir()
    folder = "c/" if any(stem.startswith("c/") for stem, *_ in members) else ""
    for stem, ending, contents, kind in [(f"{folder}z", "png", png(), tarfile.REGTYPE), *members]:
        path = source / full_name(stem, ending)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == tarfile.SYMTYPE:
                path.symlink_to(source)
            elif kind == tarfile.LNKTYPE:
                path.hardlink_to(source / "a.png")
            elif kind == tarfile.DIRTYPE:
                path.mkdir()
                continue
            elif path.is_dir():
                continue
            elif not path.exists():
                os.mkfifo(path) if kind == tarfile.FIFOTYPE else path.write_bytes(contents)
        except OSError:  # The name is one of a file, or of a folder, already; or there is nothing to link to.
            continue
        entries.add(str(path.relative_to(source)))
    hidden = [path for path in source.rglob("*") if path.name.startswith((".", "@"))]
    inside = {entry for entry in entries for path in hidden if str(path.relative_to(source)) in _above(entry)}
    return entries - inside | {str(path.relative_to(source)) for path in hidden}


def _above(entry: str) -> list[str]:
    return [str(parent) for parent in Path(entry).parents]


def check_folder(members: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entries = write_tree(Path(folder, "in"), members)
        passed_over = PassedOver()
        try:
            samples, *_ = find_images(Path(folder, "in"), None, passed_over)
        except DataError as error:
            assert folder in str(error)
            return
        packed = sum(1 + len(sample.others) for sample in samples)
        assert packed + count(passed_over) == len(entries), (entries, str(passed_over))


def check_pack(members: list) -> None:
    """Packs a folder in two steps, the second of which resumes the first."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        entries = write_tree(source, members)
        words = (source, out, "--shard-size", 2)
        first = pack(*words, "--part", "1/2")
        if first.returncode:
            refused(first)
            return
        ended = pack(*words)
        if ended.returncode:
            refused(ended, "none of the", "can be used")
            return
        index, manifest = open_shards(out), json.loads((out / "manifest.json").read_text())
        sizes = {sample.origin: 1 + len(sample.others) for sample in find_images(source).samples}
        bad = sum(sizes[entry["file"]] for entry in manifest["bad"])
        written = sum(len(index.members(sample)) for sample in range(len(index)))
        labels = len(index) if manifest["classes"] else 0  # .cls that are made of the sub-folders
        passed_over = PassedOver.from_json(manifest["passed_over"])
        assert written - labels + bad + count(passed_over) == len(entries), (entries, manifest)
        assert str(passed_over) in ended.stderr and str(passed_over) in first.stderr


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS, more=MEMBERS, rest=RESTS, form=FORMATS, packed=st.booleans())
def test_members_of_any_tar_are_samples_passed_over_or_refused(members, more, rest, form, packed):
    check_tar(members, more, rest, form, packed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS)
def test_entries_of_any_folder_are_samples_passed_over_or_refused(members):
    check_folder(members)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS)
def test_resumed_pack_of_any_folder_holds_what_is_not_passed_over_or_unreadable(members):
    check_pack(members)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(members=MEMBERS, more=MEMBERS, rest=RESTS, form=FORMATS, packed=st.booleans())
def test_many_trees_and_tars_lose_nothing(members, more, rest, form, packed):
    check_tar(members, more, rest, form, packed)
    check_folder(members)
    check_pack(members)
