"""What of a tar is used: labels that were corrected, several images of a sample, and what is passed over and said."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.index import index_file
from data.index.__main__ import main as index_command
from data.index.index import ShardIndex, index_tars, open_shards
from data.index.index_file import RECORD
from data.index.samples import parse_label
from data.index.version_1 import HEADER_1, MAGIC_1
from data.loader.streaming import StreamShards, first_samples
from data.storage.read import read
from tasks.config import TrainConfig, evaluation_data, keep_image
from tests.servers import serving
from tests.test_index import png, write_tar

Files = list[tuple[str, bytes]]


def write_members(path: Path, files: Files) -> Path:
    """Writes a tar in which a name may occur twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, contents in files:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def keys_and_labels(index: ShardIndex) -> dict[str, int]:
    return {index.key(sample): index.label(sample) for sample in range(len(index))}


def images(index: ShardIndex) -> list[str]:
    """Returns the name of the member that is the image of each sample."""
    offsets = [index.locate(sample)[1] for sample in range(len(index))]
    return [
        member.name
        for sample, offset in enumerate(offsets)
        for member in index.members(sample)
        if member.offset == offset
    ]


def write_index_1(tar: Path) -> tuple[str, list[list[int]]]:
    """Gives a tar an index of version 1. Returns its fingerprint and its records."""
    index = open_shards(tar, image="first")
    binary = Path(f"{index.texts[0]}.bin")
    probe = index_file.HEADER.unpack_from(binary.read_bytes())[4]
    state = tar.stat()
    head, rows = HEADER_1.pack(MAGIC_1, state.st_size, state.st_mtime_ns, len(index), probe), index.table(0).tolist()
    binary.write_bytes(head + b"".join(RECORD.pack(*row) for row in rows))
    return index.fingerprint, rows


# Labels


def test_corrected_labels_of_the_same_length_are_read_anew(tmp_path):
    tar = write_tar(
        tmp_path / "x.tar", {f"{i}.{end}": data for i in range(9) for end, data in [("jpg", png()), ("cls", b"1")]}
    )
    assert set(open_shards(tar).labels) == {1}
    write_tar(tar, {f"{i}.{end}": data for i in range(9) for end, data in [("jpg", png()), ("cls", b"2")]})
    assert set(open_shards(tar).labels) == {2}


def test_labels_after_all_images_are_those_of_their_keys(tmp_path):
    files = [(f"{i:05}.png", png(i)) for i in range(40)] + [(f"{i:05}.cls", b"%d" % (i % 3)) for i in range(40)]
    index = open_shards(write_members(tmp_path / "x.tar", files))
    assert keys_and_labels(index) == {f"{i:05}": i % 3 for i in range(40)}
    assert [member.name for member in index.members(7)] == ["00007.png", "00007.cls"] and not index.passed_over
    first = open_shards(write_members(tmp_path / "y.tar", files[::-1]))
    assert keys_and_labels(first) == keys_and_labels(index)


def test_label_in_two_places_raises_data_error(tmp_path):
    files = [("a.png", png()), ("a.cls", b"1"), ("b.png", png()), ("a.cls", b"2")]
    with pytest.raises(DataError, match=r"two members with the key 'a' and the extension 'cls'"):
        open_shards(write_members(tmp_path / "x.tar", files))


def test_label_as_pandas_writes_it_is_the_number_and_names_are_counted(tmp_path):
    labels = {"a": b"2.0", "b": b"3\n", "c": b"-1", "d": b"", "e": b"cat", "f": b"2.5"}
    files = [(f"{key}.{end}", data) for key, text in labels.items() for end, data in (("png", png()), ("cls", text))]
    index = open_shards(write_members(tmp_path / "x.tar", files))
    assert keys_and_labels(index) == {"a": 2, "b": 3, "c": -1, "d": -1, "e": -1, "f": -1}
    assert "2 .cls that hold no number, taken for no label (e.cls: cat, f.cls: 2.5)" in str(index.passed_over)


def test_label_as_numpy_writes_it_is_the_number_in_index_and_stream():
    for text, label in (
        (b"%.18e\n" % 20, 20),
        (b"1e1", 10),
        (b"2.00", 2),
        (b"1.5e0", -1),
        (b"1e30", -1),
        (b"9" * 19, -1),
    ):
        assert parse_label(text) == label


def test_label_longer_than_a_number_is_read_whole(tmp_path):
    files = {"a.png": png(), "a.cls": b"%.18e\n" % 20, "b.png": png(), "b.cls": b" " * 15 + b"1234567"}
    assert keys_and_labels(open_shards(write_tar(tmp_path / "x.tar", files))) == {"a": 20, "b": 1234567}


def test_unlabelled_sample_says_what_its_label_file_or_record_holds(tmp_path):
    files = {"a.png": png(), "a.cls": b"n01440001", "b.png": png(), "b.json": b'{"label": 3}', "c.png": png()}
    files |= {"d.v2.png": png(), "d.v2.cls": b"1"}
    index = open_shards(write_tar(tmp_path / "x.tar", files))
    assert index.explain_label(0) == "a.cls holds 'n01440001', which is no number"
    assert index.explain_label(1) == "b.json has the field label=3, and labels are read from .cls alone"
    assert index.explain_label(2) == "no .cls in the shards"
    assert index.explain_label(3) == "d.v2.cls is no .cls of the key 'd', which ends at the first dot"


# Several images of a sample


def both(path: Path, keys: str = "abc") -> Path:
    return write_tar(path, {f"{key}.{end}": png(i) for key in keys for i, end in enumerate(("jpg", "png"))})


def test_two_images_of_a_sample_are_a_tie_until_one_is_chosen(tmp_path):
    tar = both(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"3 samples with more than one image: 'a' has 2, such as 'a.jpg' and 'a.png'"):
        open_shards(tar)
    built = (tmp_path / "x.idx.bin").read_bytes()
    jpg, pngs, first = (open_shards(tar, image=image) for image in ("jpg", "png", "first"))
    assert images(jpg) == images(first) == ["a.jpg", "b.jpg", "c.jpg"] and images(pngs) == ["a.png", "b.png", "c.png"]
    assert jpg.fingerprint == first.fingerprint != pngs.fingerprint
    assert [read(pngs.shards[0], *pngs.locate(i)[1:]) for i in range(3)] == [png(1)] * 3
    assert "3 images beside the image of their sample, not read (a.jpg, …)" in str(pngs.passed_over)
    assert (tmp_path / "x.idx.bin").read_bytes() == built  # All of them share one index.
    with pytest.raises(DataError, match=r"no image that ends in .webp, only .jpg \(3\), .png \(3\)"):
        open_shards(tar, image="webp")


def test_masks_after_all_images_are_a_tie_and_no_samples(tmp_path):
    names = [f"{key}.{end}" for end in ("jpg", "png", "cls") for key in "abc"]
    tar = write_members(tmp_path / "x.tar", [(name, b"4" if name.endswith("cls") else png()) for name in names])
    with pytest.raises(DataError, match=r"such as 'a.jpg' and 'a.png'"):
        open_shards(tar)
    index = open_shards(tar, image="jpg")
    assert images(index) == ["a.jpg", "b.jpg", "c.jpg"] and set(index.labels) == {4}
    assert [member.name for member in index.members(0)] == ["a.jpg", "a.png", "a.cls"]
    assert len(open_shards(tar, image="first")) == 6  # as versions before read them


def test_views_and_dotted_names_are_ties_that_name_the_rule(tmp_path):
    views = write_tar(tmp_path / "v.tar", {f"{i}.{v}.jpg": png() for i in range(3) for v in ("front", "left")})
    with pytest.raises(DataError, match=r"data.image=front.jpg or data.image=left.jpg .*ends at the first dot"):
        open_shards(views)
    assert images(open_shards(views, image="left.jpg")) == [f"{i}.left.jpg" for i in range(3)]
    dotted = write_tar(tmp_path / "d.tar", {f"2019.10.12_{i:04}.jpg": png() for i in range(100)})
    with pytest.raises(DataError, match=r"'2019' has 100, such as '2019.10.12_0000.jpg' and '2019.10.12_0001.jpg'"):
        open_shards(dotted)


def test_image_named_by_its_format_goes_before_one_with_a_further_word_and_that_is_said(tmp_path):
    files = {"a.seg.png": b"", "a.jpg": png(), "b.jpg": png(), "c.large.jpg": png()}
    index = open_shards(write_tar(tmp_path / "x.tar", files))
    assert images(index) == ["a.jpg", "b.jpg", "c.large.jpg"]
    assert "1 images beside the image of their sample, not read (a.seg.png)" in str(index.passed_over)
    chosen = open_shards(tmp_path / "x.tar", image="jpg")
    assert images(chosen) == ["a.jpg", "b.jpg"] and "1 samples without .jpg (c.large.jpg)" in str(chosen.passed_over)


def test_real_photographs_with_label_maps_need_a_choice(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"data.image=jpg or data.image=png"):
        open_shards(real_images / "camvid", "val")
    index = open_shards(real_images / "camvid", "val", image="jpg")
    assert len(index) == 101 and all(name.endswith(".jpg") for name in images(index))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector.
def test_data_module_and_stream_take_the_chosen_image(tmp_path, capsys):
    settings: dict[str, Any] = {"image_size": (8, 8), "channels": 3, "seed": 0, "global_batch": 1, "micro_batch": 1}
    tar = str(both(tmp_path / "x.tar"))
    for mode in ({}, {"mode": "stream", "samples": 3}):
        data = ShardDataModule(DataConfig(path=tar, image="png", workers=0, **mode), **settings)
        assert int(data.examples(1)[0].max()) == 1
        refused = ShardDataModule if not mode else lambda *a, **k: ShardDataModule(*a, **k).examples(1)
        with pytest.raises(DataError, match=r"data.image=jpg or data.image=png"):
            refused(DataConfig(path=tar, workers=0, **mode), **settings)
    assert "passed over in the training shards: 3 images beside" in capsys.readouterr().err
    assert DataConfig(path=tar, image=".PNG").image == "png"
    lacking = StreamShards(str(write_tar(tmp_path / "y.tar", {"a.jpg": png(), "b.png": png(2)})), 1, "png")
    assert first_samples(data.dataset(lacking), 1)["keys"] == ["b"]
    assert "sample a has no png" in capsys.readouterr().err
    lacking.classes = 2
    with pytest.raises(DataError, match=r"sample b: its .cls is missing, and task.classes=2 wants a number below 2"):
        first_samples(data.dataset(lacking), 1)


# Indexes of version 1


def test_index_of_version_1_is_converted_where_it_is_right(tmp_path):
    files = {f"{i}.{end}": data for i in range(5) for end, data in (("jpg", png(i)), ("cls", b"%d" % i))}
    tar = write_tar(tmp_path / "x.tar", files)
    fingerprint, rows = write_index_1(tar)
    state = tar.stat()
    contents = tar.read_bytes()
    tar.write_bytes(b"?" * 512 + contents[512:])  # A header that only building anew would read.
    os.utime(tar, ns=(state.st_mtime_ns, state.st_mtime_ns))
    after = open_shards(tar)
    assert after.fingerprint == fingerprint and after.table(0).tolist() == rows
    assert keys_and_labels(after) == {str(i): i for i in range(5)}


def test_index_of_version_1_is_built_anew_where_its_text_does_not_show_everything(tmp_path):
    folder = tmp_path / "d"
    write_members(folder / "named.tar", [("a.png", png()), ("a.cls", b"cat")])
    write_members(folder / "hidden.tar", [("b.png", png()), ("._a.png", png()), ("a.png", png())])
    for name in ("named", "hidden"):
        write_index_1(folder / f"{name}.tar")
        assert open_shards(folder / f"{name}.tar").passed_over
    joined = folder / "joined.tar"
    joined.write_bytes(b"".join((folder / f"{name}.tar").read_bytes() for name in ("named", "hidden")))
    index = open_shards(joined)
    assert [index.key(sample) for sample in range(3)] == ["a", "b", "a"]
    assert "1 keys that occur again" in str(index.passed_over)


def test_index_of_version_1_with_ties_keeps_what_it_read(tmp_path):
    tar = both(tmp_path / "x.tar")
    fingerprint, _ = write_index_1(tar)
    with pytest.raises(DataError, match="more than one image"):
        open_shards(tar)
    assert open_shards(tar, image="first").fingerprint == fingerprint


@pytest.mark.parametrize("version", [1, 2])
def test_index_beside_a_remote_tar_is_not_used_if_only_the_tar_changed(tmp_path, monkeypatch, version):
    def write(label: bytes) -> Path:
        files = {f"{i}.{end}": data for i in range(3) for end, data in (("png", png(i)), ("cls", label))}
        return write_tar(tmp_path / "in" / "x.tar", files)

    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))
    tar = write(b"1")
    local = open_shards(tar).fingerprint
    if version == 1:
        write_index_1(tar)
    with serving(tar.parent) as server:
        index = open_shards(f"{server.url}/x.tar")
        assert index.fingerprint == local and set(index.labels) == {1}
        os.utime(write(b"2"), (2_000_000_000, 2_000_000_000))
        assert set(open_shards(f"{server.url}/x.tar").labels) == {2}


# What is passed over


def add(tar: tarfile.TarFile, name: str, kind: bytes, contents: bytes = b"") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "elsewhere", len(contents)
    tar.addfile(info, io.BytesIO(contents))


def test_members_that_belong_to_no_sample_are_counted_by_reason_with_examples(tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            add(tar, name, kind)
        add(tar, "pipe.jpg", tarfile.FIFOTYPE)
        for name in ("a.png", "a.txt", ".DS_Store", "README", "lone.json", "lone.xml", "c/@eaDir/a.png/THUMB.jpg"):
            add(tar, name, tarfile.REGTYPE, png())
    with open(tmp_path / "x.tar", "ab") as file:
        file.write(b"no archive")
    index_command([str(tmp_path / "x.tar")])
    said = capsys.readouterr().out
    assert "1 shards, 1 samples" in said
    for words in (
        "2 links in tars (link.jpg, hard.jpg)",
        "1 special files (pipe.jpg)",
        "1 hidden files (.DS_Store)",
        "1 files without an extension (README)",
        "2 files without an image of their key (lone.json, lone.xml)",
        "1 files and folders of thumbnails and waste (c/@eaDir/a.png/THUMB.jpg)",
        f"10 bytes after the end of an archive ({tmp_path / 'x.tar'})",
    ):
        assert words in said
    with pytest.raises(DataError, match="--strict: passed over: 2 links"):
        index_command([str(tmp_path / "x.tar"), "--strict"])
    assert str(open_shards(tmp_path / "x.tar").passed_over) in said  # The index knows it the next time too.


def test_tars_joined_with_cat_are_read_to_the_end(tmp_path):
    parts = [
        write_tar(tmp_path / f"{name}.tar", {f"{name}{i}.png": png() for i in range(n)})
        for name, n in (("a", 20), ("b", 30))
    ]
    joined = tmp_path / "ab.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    index = open_shards(joined)
    assert len(index) == 50 and index.key(49) == "b29" and not index.passed_over


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_members_with_holes_raise_data_error(tmp_path, form):
    with open(tmp_path / "a.npy", "wb") as file:
        file.write(b"x" * 4096)
        file.seek(1 << 20)
        file.write(b"y" * 4096)
    assert os.system(f"tar -C {tmp_path} -S --format={form} -cf {tmp_path}/x.tar a.npy") == 0
    with pytest.raises(DataError, match=r"holds 'a.npy' with holes \(tar -S\).* Make the tar anew without -S"):
        open_shards(tmp_path / "x.tar")


def test_tars_without_any_file_are_passed_over_among_others(tmp_path):
    for name, files in (("a", {"a.png": png()}), ("b", {}), ("c", {"c.png": png()})):
        write_tar(tmp_path / f"{name}.tar", files)
    index = open_shards(tmp_path)
    assert len(index) == 2 and [os.path.basename(shard) for shard in index.shards] == ["a.tar", "c.tar"]
    assert "1 tars without any file" in str(index.passed_over)
    with pytest.raises(DataError, match=r"b\.tar is an archive without any file"):
        open_shards(tmp_path / "b.tar")
    paths = [str(tmp_path / name) for name in ("b.tar", "a.tar", "c.tar")]
    config = DataConfig(path=[f"{tmp_path}/[ab].tar", paths[2]], weights=[0.5, 0.5], workers=0)
    data = ShardDataModule(config, image_size=(8, 8), channels=3, seed=0, global_batch=2, micro_batch=1)
    assert data.steps_per_epoch == 1 and len(index_tars(paths)) == 2


def test_tar_of_tars_says_how_to_unpack_it(tmp_path):
    files = {f"n0{i}.tar": b"x" * 99 for i in range(3)}
    with pytest.raises(DataError, match=r"holds 3 archives such as 'n00.tar' and no image. Unpack it once"):
        open_shards(write_tar(tmp_path / "imagenet.tar", files))


def test_parts_with_a_year_are_parts(tmp_path):
    for name in ("coco-train2017-000000", "coco-val2017-000000"):
        write_tar(tmp_path / f"{name}.tar", {"a.png": png()})
    assert len(open_shards(tmp_path, "train")) == 1
    with pytest.raises(DataError, match="mixes the splits train and val"):
        open_shards(f"{tmp_path}/*.tar")


def test_paths_in_the_home_folder_and_file_urls_are_local_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "x.tar", {"a.png": png()})
    assert open_shards("~/x.tar").shards == open_shards(f"file://{tmp_path}/x.tar").shards == [f"{tmp_path}/x.tar"]


def test_resumed_run_keeps_the_image_that_it_read(tmp_path):
    def settings(**given: Any) -> TrainConfig:
        data = DataConfig(path="x", **given)
        return TrainConfig.model_construct(name="a", runs=str(tmp_path), trial=None, overwrite=False, data=data)

    def write_config(data: str) -> None:
        (tmp_path / "a" / "config.yaml").write_text(f"model: {{}}\noptim: {{}}\nglobal_batch: 1\n{data}")

    assert keep_image(settings()).data.image is None  # There is no run yet.
    (tmp_path / "a").mkdir()
    for stored, image in (("data: {path: x}", "first"), ("data: {image: png}", "png"), ("data: {image: null}", None)):
        write_config(stored)
        assert keep_image(settings()).data.image == image and keep_image(settings(image="jpg")).data.image == "jpg"
    write_config("data: {path: x}")
    assert evaluation_data(tmp_path / "a", {}).image == "first"
    assert evaluation_data(tmp_path / "a", {"path": "y"}).image is None


def test_zeros_where_members_should_be_are_counted(tmp_path):
    whole = write_tar(tmp_path / "x.tar", {f"{i}.png": png() for i in range(50)}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:20480] + bytes(len(whole) - 20480))  # as a download that made room at first
    index = open_shards(tmp_path / "x.tar")
    assert len(index) == 20 and f"{len(whole) - 20480:,} bytes of zeros after the end of an archive" in str(
        index.passed_over
    )


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "`git lfs pull` fetches"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_file_that_is_called_tar_and_is_none_says_what_it_is(tmp_path, start, says):
    (tmp_path / "x.tar").write_bytes(start + b"?" * 2000)
    with pytest.raises(DataError, match=f"x.tar is not a tar archive .*{says}"):
        open_shards(tmp_path / "x.tar")


def test_member_of_negative_length_raises_data_error(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.png", tarfile.REGTYPE, png())
        info = tarfile.TarInfo("b.png")
        info.size = -4096
        tar.addfile(info)
    with pytest.raises(DataError, match=r"x\.tar is truncated: its member 'b.png'"):
        open_shards(tmp_path / "x.tar")


def test_shard_that_is_a_dead_link_or_there_twice_raises_data_error(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png()})
    (tmp_path / "b.tar").symlink_to("nowhere.tar")
    with pytest.raises(DataError, match=r"b\.tar is a link that leads nowhere"):
        open_shards(tmp_path)
    (tmp_path / "b.tar").unlink()
    (tmp_path / "b.tar").symlink_to("a.tar")
    with pytest.raises(DataError, match=r"a\.tar is listed 2 times"):
        open_shards(tmp_path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector.
def test_stream_without_an_image_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.streaming.MAX_WITHOUT", 10)
    config = DataConfig(path=str(write_tar(tmp_path / "x.tar", {"a.png": png()})), workers=0)
    data = ShardDataModule(config, image_size=(8, 8), channels=3, seed=0, global_batch=1, micro_batch=1)
    lacking = StreamShards(str(tmp_path / "x.tar"), 1, "webp")
    with pytest.raises(DataError, match=r"none of 10 samples has an image that ends in \.webp; the last is .*sample a"):
        first_samples(data.dataset(lacking), 1)


def test_shard_in_another_compression_beside_tars_raises_data_error(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": png()})
    (tmp_path / "b.tar.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"compressed shards such as b\.tar\.zst"):
        open_shards(tmp_path)
    write_tar(tmp_path / "b.tar", {"b.png": png()})
    assert len(open_shards(tmp_path)) == 2


def mapped(folder: Path, name: str = "x.tar", **beside: bytes) -> Path:
    """A tar of photographs, each with a map of classes and one of depth; the map may come first."""
    members = {"a.jpg": png(1), "a.png": png(2), "a.depth.png": png(3), "b.png": png(4), "b.jpg": png(5)}
    return write_tar(folder / name, members | beside)


def test_declared_maps_are_no_images_and_no_tie(tmp_path: Path) -> None:
    tar = str(mapped(tmp_path))
    with pytest.raises(DataError, match="2 samples with more than one image"):
        open_shards(tar)
    index = open_shards(tar, maps=("png", "depth.png"))
    assert images(index) == ["a.jpg", "b.jpg"] and not index.passed_over
    assert images(open_shards(tar, maps=("png",))) == ["a.jpg", "b.jpg"]  # .jpg goes before .depth.png
    # The same images in the same order: what was trained without the maps resumes with them.
    assert index.fingerprint == open_shards(tar, image="jpg").fingerprint
    assert images(open_shards(tar, image="first", maps=("png", "depth.png"))) == ["a.jpg", "b.jpg"]


def test_shards_without_declared_maps_are_read_as_ever(tmp_path: Path) -> None:
    without = str(write_tar(tmp_path / "y.tar", {"c.jpeg": png(1), "d.jpeg": png(2)}))
    index = open_shards([str(mapped(tmp_path)), without], maps=("png", "depth.png"))
    assert images(index) == ["a.jpg", "b.jpg", "c.jpeg", "d.jpeg"]


def test_map_without_a_photograph_is_no_sample_and_is_named(tmp_path: Path) -> None:
    index = open_shards(str(mapped(tmp_path, **{"c.png": png(6)})), maps=("png", "depth.png"))
    assert images(index) == ["a.jpg", "b.jpg"] and "1 samples without .jpg (c.png)" in str(index.passed_over)


def test_maps_that_leave_no_image_or_several_are_refused(tmp_path: Path) -> None:
    alone = str(write_tar(tmp_path / "alone.tar", {"a.png": png(1), "b.png": png(2)}))
    with pytest.raises(DataError, match=r"no image beside its maps: all that could be one ends in \.png"):
        open_shards(alone, maps=("png",))
    several = str(mapped(tmp_path, "several.tar", **{"c.webp": png(1), "c.png": png(2)}))
    with pytest.raises(
        DataError, match=r"several kinds beside its maps \(.depth.png and .png\): .jpg \(2\), .webp \(1\)"
    ):
        open_shards(several, maps=("png", "depth.png"))
    with pytest.raises(DataError, match=r"has no \.seg\.png, which data\.label_maps .* \.png \(3\), \.jpg \(2\)\."):
        open_shards(several, maps=("seg.png", "depth.png", "webp"))


def test_image_that_is_declared_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="image=png is declared to be a map"):
        DataConfig(path="x", image="png", label_maps=".PNG")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector.
def test_stream_takes_no_declared_map_for_an_image(tmp_path: Path) -> None:
    config = DataConfig(path=str(mapped(tmp_path)), mode="stream", samples=2, workers=0, label_maps="png")
    data = ShardDataModule(config, image_size=(8, 8), channels=3, seed=0, global_batch=1, micro_batch=1)
    found = first_samples(data.dataset(data.train_index), 2)["images"]
    assert sorted(found[:, 0, 0, 0].tolist()) == [1, 5]
