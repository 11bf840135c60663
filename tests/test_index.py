"""Indexing tars that others wrote, and which tars a path means."""

import errno
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.errors import DataError
from data.index import __main__ as unpacking
from data.index import index_file
from data.index.build import build
from data.index.index import open_shards
from data.index.samples import split_name
from data.index.splits import find_shards, has_split
from data.index.tar import Member, open_local, walk
from data.loader.streaming import StreamShards
from data.storage.read import read
from tests.processes import completed


def png(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def members(path: Path) -> list[Member]:
    with open_local(str(path)) as tar:
        return list(walk(tar))


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, contents in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def shard(path: Path, samples: int = 3) -> Path:
    return write_tar(path, {f"{path.stem}_{i:03d}.png": png(i) for i in range(samples)})


def run_index(*arguments: object) -> subprocess.CompletedProcess:
    return completed([sys.executable, "-m", "data.index", *map(str, arguments)])


# Members and their places


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_equal_those_of_tarfile(tmp_path, form):
    files = {"a.jpg": b"x" * 700, "d/é b.png": b"", "d/" + "n" * 90 + ".cls": b"5"}
    if form != tarfile.USTAR_FORMAT:
        files["long/" + "m" * 300 + ".png"] = b"y" * 512
    path = write_tar(tmp_path / "x.tar", files, form)
    with tarfile.open(path) as tar:
        assert [tuple(m) for m in members(path)] == [(m.name, m.offset_data, m.size) for m in tar.getmembers()]


def test_folders_and_links_in_a_tar_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert [member.name for member in members(tmp_path / "x.tar")] == ["a.jpg"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector.
def test_real_shards_give_the_samples_of_webdataset(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path))
    index = open_shards(real_images / "grocery", "val")
    expected = list(webdataset.WebDataset(index.shards, shardshuffle=False))
    assert len(index) == len(expected) == 252
    for sample in range(0, 252, 17):
        number, offset, size = index.locate(sample)
        assert read(index.shards[number], offset, size) == expected[sample]["jpg"]
        assert index.key(sample) == expected[sample]["__key__"]
        assert index.label(sample) == int(expected[sample]["cls"])


def test_text_index_equals_that_of_wds2idx(tmp_path):
    """`v1.2 SAMPLES`, then `EXTENSION OFFSET SIZE NAME` of each member of a sample on one line (DALI's wds2idx.py)."""
    files = {"d/a.jpg": png(), "d/a.seg.png": b"ss", "d/.hidden.jpg": b"h", "no_extension": b"n", "b.cls": b"1"}
    tar = write_tar(tmp_path / "x.tar", files)
    build(str(tar))
    places = {member.name: f"{member.offset} {member.size}" for member in members(tar)}
    assert (tmp_path / "x.idx").read_text() == (
        f"v1.2 2\njpg {places['d/a.jpg']} d/a.jpg seg.png {places['d/a.seg.png']} d/a.seg.png\n"
        f"cls {places['b.cls']} b.cls\n"
    )


def test_keys_labels_and_images_are_found_in_awkward_samples(tmp_path):
    files = {
        "only.json": b"{}",
        "two words.cls": b" 7\n",
        "two words.jpg": png(),
        "é/größe.json": b"{}",
        "é/größe.JPEG": png(),
        "bad.cls": b"cat",
        "bad.jpg": png(),
        "x.large.jpg": png(),
        "y.seg.png": b"mask",
        "y.jpg": png(),
    }
    index = open_shards(write_tar(tmp_path / "x.tar", files))
    samples = [(index.key(sample), index.label(sample)) for sample in range(len(index))]
    assert samples == [("two words", 7), ("é/größe", -1), ("bad", -1), ("x", -1), ("y", -1)]
    assert all(read(index.shards[0], *index.locate(sample)[1:]) == png() for sample in range(len(index)))


# What is refused


def truncated_in_a_member(path: Path) -> None:
    os.truncate(path, [member.offset for member in members(path)][-1] + 10)


def truncated_in_a_header(path: Path) -> None:
    os.truncate(path, [member.offset for member in members(path)][-1] - 300)


def header_damaged_in_the_middle(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[[member.offset for member in members(path)][1] - 400] ^= 0xFF
    path.write_bytes(contents)


def no_tar(path: Path) -> None:
    path.write_bytes(png() * 20)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def no_image(path: Path) -> None:
    write_tar(path, {"a.txt": b"x", "a.json": b"{}"})


def same_member_twice(path: Path) -> None:
    write_tar(path, {"a.1.jpg": png(), "a.1.JPG": png()})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated_in_a_member, "is truncated: its member 'x_002.png' should end at byte"),
        (truncated_in_a_header, "is truncated at byte"),
        (header_damaged_in_the_middle, "is damaged at byte"),
        (no_tar, "is not a tar archive"),
        (empty_file, "is empty"),
        (no_image, "holds no image: none of its 2 files ends in .jpg"),
        (same_member_twice, "two members with the key 'a'"),
    ],
)
def test_bad_tar_raises_one_line_data_error_and_leaves_no_index(tmp_path, damage, says):
    path = shard(tmp_path / "x.tar")
    damage(path)
    with pytest.raises(DataError, match=re.escape(says)) as error:
        open_shards(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.idx*"))
    ended = run_index(path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("error: ")


def test_compressed_tar_raises_data_error_naming_the_unpack_command(tmp_path):
    tar = shard(tmp_path / "in" / "x.tar")
    packed = tar.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    tar.unlink()
    for path in (packed, packed.parent, f"{packed.parent}/*"):
        with pytest.raises(DataError, match=r"python -m data\.index --unpack OUT"):
            open_shards(path)
    ended = run_index("--unpack", tmp_path / "out", packed.parent)
    assert ended.returncode == 0 and "1 shards, 3 samples" in ended.stdout
    assert len(open_shards(tmp_path / "out")) == 3
    packed.write_bytes(packed.read_bytes()[:-50])
    ended = run_index("--unpack", tmp_path / "out2", packed)
    assert ended.returncode == 2 and "is no complete gzip file" in ended.stderr
    assert not list((tmp_path / "out2").iterdir())


def packed_tar(folder: Path, contents: bytes, name: str = "x.tar.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(gzip.compress(contents, 1))
    return folder / name


def test_unpack_of_a_bomb_or_no_tar_raises_data_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 1 << 20)
    tar = write_tar(tmp_path / "in.tar", {"a.jpg": bytes(20 << 20)})
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"would unpack to more than .* bytes.*gunzip"):
        unpacking.unpack(str(packed_tar(tmp_path, tar.read_bytes())), tmp_path / "out")
    with pytest.raises(DataError, match="holds no tar archive"):
        unpacking.unpack(str(packed_tar(tmp_path, b"no tar" * 1000)), tmp_path / "out")
    with pytest.raises(DataError, match="holds nothing"):
        unpacking.unpack(str(packed_tar(tmp_path, b"")), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_unpack_on_a_full_disk_raises_data_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target, packed):
        target.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    packed = packed_tar(tmp_path, shard(tmp_path / "in.tar").read_bytes())
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(unpacking, "_copy", full)
    with pytest.raises(DataError, match="No space left on device"):
        unpacking.unpack(str(packed), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_unpack_never_overwrites_another_tar(tmp_path, capsys):
    one, other = (shard(tmp_path / f"{n}.tar", n).read_bytes() for n in (3, 4))
    first, second = packed_tar(tmp_path / "a", one), packed_tar(tmp_path / "b", other)
    with pytest.raises(DataError, match=r"would both become x\.tar"):
        unpacking.main(["--unpack", str(tmp_path / "out"), str(first), str(second)])
    for _ in range(2):  # the second time it is there already
        unpacking.main(["--unpack", str(tmp_path / "out"), str(first), str(shard(tmp_path / "y.tar"))])
        assert (tmp_path / "out" / "x.tar").read_bytes() == one
        assert "1 tars are unpacked already and not copied" in capsys.readouterr().err
    with pytest.raises(DataError, match="is there already, and is not what"):
        unpacking.main(["--unpack", str(tmp_path / "out"), str(second)])
    assert (tmp_path / "out" / "x.tar").read_bytes() == one


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does not close files
@pytest.mark.parametrize("name", ["pipe:touch hacked && cat x.tar", "file:x.tar", "s3:x.tar"])
def test_local_file_called_like_a_command_or_url_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / name)
    shards = StreamShards("*.tar", 3).shards
    assert shards == find_shards("*.tar") == [f"./{name}"]
    assert len(list(webdataset.WebDataset(shards, shardshuffle=False))) == 3
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(DataError, match="cannot be indexed"):
        find_shards("pipe:cat x.tar")


# The index files


def test_index_is_built_once_and_again_when_the_tar_changes(tmp_path):
    path = shard(tmp_path / "x.tar", 3)
    first = open_shards(path)
    built = (tmp_path / "x.idx.bin").stat().st_mtime_ns
    assert open_shards(path).fingerprint == first.fingerprint
    assert (tmp_path / "x.idx.bin").stat().st_mtime_ns == built
    os.utime(path, (1, 1))  # Another time may mean other labels: nothing is taken on trust.
    assert open_shards(path).fingerprint == first.fingerprint
    assert (tmp_path / "x.idx.bin").stat().st_mtime_ns != built
    write_tar(path, {f"y_{i:03d}.png": png(i) for i in range(3)})  # Another tar of the same length.
    again = open_shards(path)
    assert again.key(0) == "y_000" and again.fingerprint != first.fingerprint
    shard(path, 9)
    assert len(open_shards(path)) == 9


def test_index_of_a_read_only_folder_goes_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))
    path = shard(tmp_path / "fixed" / "x.tar")
    path.parent.chmod(0o555)
    try:
        assert open_shards(path).key(2) == "x_002"
        assert [file.name for file in path.parent.iterdir()] == ["x.tar"]
        assert len(list((tmp_path / "cache").glob("*/x.idx.bin"))) == 1
        assert open_shards(path.parent).texts[0].startswith(str(tmp_path / "cache"))
    finally:
        path.parent.chmod(0o755)


def test_torn_index_is_rebuilt(tmp_path):
    path = shard(tmp_path / "x.tar")
    open_shards(path)
    for contents in (b"", b"x" * 30, (tmp_path / "x.idx.bin").read_bytes()[:-8]):
        (tmp_path / "x.idx.bin").write_bytes(contents)
        assert open_shards(path).key(1) == "x_001"


def test_changed_text_index_raises_data_error(tmp_path):
    path = shard(tmp_path / "x.tar")
    index = open_shards(path)
    (tmp_path / "x.idx").write_text("v1.2 1\npng 512 70 other.png\n")
    with pytest.raises(DataError, match="was changed"):
        index.key(2)


def test_fingerprint_depends_on_the_shards_and_not_on_their_folder(tmp_path):
    shard(tmp_path / "one" / "a.tar"), shard(tmp_path / "two" / "a.tar"), shard(tmp_path / "two" / "b.tar")
    assert open_shards(tmp_path / "one").fingerprint == open_shards(tmp_path / "two" / "a.tar").fingerprint
    both = [str(tmp_path / "two" / "a.tar"), str(tmp_path / "two" / "b.tar")]
    assert len({open_shards(paths).fingerprint for paths in (both, both[::-1], both[:1])}) == 3


def test_index_of_100_shards_pickles_below_40_kb_and_reads_keys(tmp_path):
    index = open_shards([shard(tmp_path / f"{i:03d}.tar") for i in range(100)])
    assert index.key(250) == "083_001"
    pickled = pickle.dumps(index)
    assert len(pickled) < 40_000 and pickle.loads(pickled).key(299) == "099_002"


def test_index_of_3000_shards_opens_and_pickles_below_1_mb(tmp_path):
    """Three thousand, in three elevenths of the memory that is allowed for 11,000; benchmarks/index.py has the time."""
    first = shard(tmp_path / "00000.tar", 100)
    build(str(first))
    binary, state = (tmp_path / "00000.idx.bin").read_bytes(), first.stat()
    for i in range(1, 3000):
        (tmp_path / f"{i:05d}.tar").touch()
        os.truncate(tmp_path / f"{i:05d}.tar", state.st_size)
        os.utime(tmp_path / f"{i:05d}.tar", ns=(state.st_mtime_ns, state.st_mtime_ns))
        (tmp_path / f"{i:05d}.idx.bin").write_bytes(binary)
    index = open_shards(tmp_path)
    assert len(index) == 300_000 and len(pickle.dumps(index)) < 1_000_000
    assert index.locate(299_999)[0] == 2999


# What a path means


@pytest.fixture
def folder(tmp_path):
    for name in ("x-train-000000", "x-train-000001", "x-val-000000", "x-test-000000"):
        shard(tmp_path / f"{name}.tar")
    return tmp_path


def names(shards) -> list[str]:
    return [os.path.basename(name) for name in shards]


def test_folder_of_tars_named_by_split_gives_the_split_asked_for(folder):
    assert names(find_shards(folder, "train")) == ["x-train-000000.tar", "x-train-000001.tar"]
    assert names(find_shards(folder, "val")) == ["x-val-000000.tar"]
    assert has_split(folder, "test") and not has_split(folder / "x-train-000000.tar", "train")


def test_folder_with_split_subfolders_gives_the_split_asked_for(tmp_path):
    shard(tmp_path / "train" / "a.tar"), shard(tmp_path / "validation" / "b.tar")
    assert names(find_shards(tmp_path, "train")) == ["a.tar"] and names(find_shards(tmp_path, "val")) == ["b.tar"]
    with pytest.raises(DataError, match="has no test part, only train and val"):
        find_shards(tmp_path, "test")
    with pytest.raises(DataError, match="mixes the splits train and val"):
        find_shards(tmp_path)


def test_manifest_names_the_shards_of_each_split(tmp_path):
    for name in "abc":
        shard(tmp_path / f"{name}.tar")
    splits = {"train": {"shards": [{"file": "a.tar"}, {"file": "b.tar"}]}, "val": {"shards": [{"file": "c.tar"}]}}
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": splits}))
    assert names(find_shards(tmp_path, "train")) == ["a.tar", "b.tar"] and has_split(tmp_path, "val")
    with pytest.raises(DataError, match="mixes the splits train and val"):
        find_shards(f"{tmp_path}/*.tar", "train")
    (tmp_path / "c.tar").unlink()
    with pytest.raises(DataError, match=r"c\.tar, which manifest\.json lists, is missing"):
        find_shards(tmp_path, "train")


def test_folder_without_splits_gives_all_shards(tmp_path):
    shard(tmp_path / "a.tar"), shard(tmp_path / "b.tar")
    assert len(find_shards(tmp_path, "train")) == len(find_shards(tmp_path, "val")) == len(find_shards(tmp_path)) == 2
    assert not has_split(tmp_path, "val")


def test_paths_that_mix_splits_raise_data_error(folder):
    for paths in (f"{folder}/*.tar", sorted(map(str, folder.glob("*.tar"))), folder):
        with pytest.raises(DataError, match="mixes the splits"):
            find_shards(paths, None if paths == folder else "train")
    shard(folder / "extra.tar")
    with pytest.raises(DataError, match=r"others that do not.*extra\.tar"):
        find_shards(folder, "train")


def test_globs_lists_and_braces_find_the_same_shards(folder):
    train = ["x-train-000000.tar", "x-train-000001.tar"]
    for paths in (f"{folder}/*train*", f"{folder}/x-train-{{000000..000001}}.tar", [folder / name for name in train]):
        assert names(find_shards(paths, "train")) == train
    open_shards(f"{folder}/*train*")
    assert names(find_shards(f"{folder}/*train*", "train")) == train  # Though the glob matches the indexes as well.


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere", "does not exist"),
        ("nowhere/*.tar", "no file matches"),
        ("{nowhere,else}.tar", "does not exist"),
        ("empty", "holds no shard"),
        ("ftp://host/x.tar", "unknown protocol ftp"),
    ],
)
def test_path_without_shards_raises_data_error(tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        find_shards(path if "://" in path else f"{tmp_path}/{path}")


def test_shard_listed_twice_raises_data_error(folder):
    path = str(folder / "x-train-000000.tar")
    with pytest.raises(DataError, match="listed 2 times"):
        find_shards([path, path])


def test_index_command_indexes_all_splits_of_a_folder(folder):
    ended = run_index(folder)
    assert ended.returncode == 0 and "4 shards, 12 samples" in ended.stdout
    assert len(list(folder.glob("*.idx"))) == len(list(folder.glob("*.idx.bin"))) == 4


def test_index_sizes_are_samples_per_shard(folder):
    index = open_shards(folder, "train")
    assert index.sizes.dtype == np.int64 and index.sizes.tolist() == [3, 3] and len(index) == 6


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.cls"],
        ["0/a b.jpg", "0/a b.seg.jpg", "0/a b.json"],
        ["v1.jpg x/a.jpg", "v1.jpg x/a.cls"],
        ["v1.2/a.jpg"],
        ["a.jpgx", "a.jpg"],
        ["12 34/a.png"],
    ],
)
def test_parse_key_agrees_with_parse_members(names):
    members = [(name.rpartition("/")[2].partition(".")[2], 512 + 1024 * i, 12, name) for i, name in enumerate(names)]
    line = " ".join(f"{extension} {offset} {size} {name}" for extension, offset, size, name in members)
    listed = list(index_file.parse_members(line))
    assert [member.name for member in listed] == names
    for member in listed:
        assert index_file.parse_key(line, member.offset) in (None, split_name(member.name)[0])
    assert index_file.parse_key(line, 7) is None


@pytest.mark.parametrize(
    ("files", "path", "says"),
    [
        (["my photos/a.JPG"], "my photos", "data.pack '{}/my photos' 'datasets/my photos' --val 0.05`"),
        (["in/cat/deep/er/a.png", "in/dog/b.png"], "in", "data.pack {}/in datasets/in --val 0.05`, and give the path"),
        (["in/train/a.png", "in/val/b.png"], "in", "{}/in/train datasets/in/train` and `python -m data.pack {}/in/val"),
        (["in/val/b.png"], "in/val", "data.pack {}/in/val datasets/in/val`, and give the path datasets/in instead"),
        (["in/a.png"], "in/a.png", "is an image and no shard. Pack images with `python -m data.pack {}/in"),
        (["in/a.png"], "in/*.png", "matches images or lists and no shard. Pack images with `python -m data.pack {}/in"),
        (["list.csv"], "list.csv", "is a list and no shard. Pack images with `python -m data.pack {}/list.csv"),
    ],
)
def test_path_of_images_raises_data_error_with_the_command_that_packs_them(tmp_path, files, path, says):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as refused:
        find_shards(f"{tmp_path}/{path}", "train")
    assert says.replace("{}", str(tmp_path)) in str(refused.value)


def test_validation_path_of_images_names_a_pack_of_that_part_alone(tmp_path):
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"held_out datasets/held_out/val`, and give the path datasets/held_out"):
        find_shards(tmp_path / "held_out", "val")


def test_images_in_datasets_are_not_packed_into_their_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets" / "pets").mkdir(parents=True)
    (tmp_path / "datasets" / "pets" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"datasets/pets datasets/pets-packed --val 0\.05"):
        find_shards("datasets/pets")
