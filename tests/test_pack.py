"""Packing an image folder: what is written, what is refused, and what an interruption leaves."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.errors import DataError, command
from data.folder import find_images
from data.index import open_shards
from data.pack import main
from data.read import read

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def pack(*arguments: object) -> Ended:
    """The command in this process: a new one would spend its time on importing torch."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            command(lambda: main([str(argument) for argument in arguments]))
        except SystemExit as end:
            return Ended(int(end.code or 0), out.getvalue(), err.getvalue())


def refused(ended: Ended, *says: object) -> None:
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(str(word) in last for word in says), last


def image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (value % 256, 255 - value % 256, 7)).save(path)
    return path


@pytest.fixture
def classes(tmp_path) -> Path:
    for name, number in (("cat", 7), ("dog", 5), ("owl", 8)):
        for i in range(number):
            image(tmp_path / "images" / name / f"{name}{i}.{('jpg', 'png', 'JPEG')[i % 3]}", i)
    return tmp_path / "images"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_a_folder_of_classes_becomes_shards_with_labels(classes, tmp_path):
    (classes / "notes.txt").write_text("no image")
    ended = pack(classes, tmp_path / "out", "--name", "pets", "--shard-size", 6)
    assert ended.returncode == 0, ended.stderr
    assert "20 samples in 4 shards, 3 classes" in ended.stdout and "1 files" in ended.stderr
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    index = open_shards(out)
    assert [shard["file"] for shard in manifest["shards"]] == [f"pets-{i:06d}.tar" for i in range(4)]
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == digests(out)
    assert [shard["samples"] for shard in manifest["shards"]] == index.sizes.tolist() == [6, 6, 6, 2]
    assert manifest["samples"] == 20 and manifest["fingerprint"] == index.fingerprint
    assert manifest["bytes"] == sum(os.path.getsize(shard) for shard in index.shards)
    assert manifest["classes"] == ["cat", "dog", "owl"] and manifest["seed"] == 0 and manifest["bad"] == []
    assert index.texts[0] == str(out / "pets-000000.idx")  # Not built anew: pack left the indexes beside the tars.
    keys = [index.key(sample) for sample in range(20)]
    assert sorted(keys) == sorted(f"{p.parent.name}/{p.stem}" for p in classes.glob("*/*"))
    for sample, key in enumerate(keys):
        assert index.label(sample) == ["cat", "dog", "owl"].index(key.split("/")[0])
        number, offset, size = index.locate(sample)
        assert read(index.shards[number], offset, size) == next(classes.glob(f"{key}.*")).read_bytes()
    assert keys != sorted(keys)
    assert not (tmp_path / "out.partial").exists() and not (out / "bad_files.txt").exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector.
def test_webdataset_reads_the_shards(classes, tmp_path):
    assert pack(classes, tmp_path / "out").returncode == 0
    index = open_shards(tmp_path / "out")
    samples = list(webdataset.WebDataset(index.shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 20
    for sample, found in enumerate(samples):
        assert found["__key__"] == index.key(sample) and found["cls"] == index.label(sample)
        picture = next(found[extension] for extension in ("jpg", "png", "jpeg") if extension in found)
        assert picture.size == (16, 12)


def test_equal_seeds_give_equal_bytes(classes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert pack(classes, tmp_path / name, "--name", "x", "--seed", seed).returncode == 0
        time.sleep(0.01)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")
    fingerprints = [json.loads((tmp_path / name / "manifest.json").read_text())["fingerprint"] for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_flat_folder_has_no_labels_and_a_part_is_named_after_its_data_set(tmp_path):
    for i in range(5):
        image(tmp_path / "flat" / f"my picture.v{i}.png", i)
    assert pack(tmp_path / "flat", tmp_path / "pets" / "train").returncode == 0
    index = open_shards(tmp_path / "pets", "train")
    assert os.path.basename(index.shards[0]) == "pets-train-000000.tar"
    assert sorted(index.key(i) for i in range(5)) == [f"my_picture_v{i}" for i in range(5)]
    assert {index.label(i) for i in range(5)} == {-1}


def test_unreadable_images_are_listed_and_left_out(classes, tmp_path):
    (classes / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no jpeg")
    whole = image(classes / "owl" / "cut.png").read_bytes()
    (classes / "owl" / "cut.png").write_bytes(whole[:-30])
    ended = pack(classes, tmp_path / "out")
    assert ended.returncode == 0 and "20 samples" in ended.stdout and "2 unreadable" in ended.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sorted(entry["file"] for entry in manifest["bad"]) == ["cat/broken.jpg", "owl/cut.png"]
    listed = (tmp_path / "out" / "bad_files.txt").read_text()
    assert all(f"{entry['file']}\t{entry['reason']}\n" in listed for entry in manifest["bad"])
    refused(pack(classes, tmp_path / "out2", "--max-bad", 1), "2 images cannot be decoded", "--max-bad 1")
    assert pack(classes, tmp_path / "out3", "--max-bad", 2).returncode == 0
    assert not list(tmp_path.glob("out2*"))


def test_nothing_readable_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"nothing")
    refused(pack(tmp_path / "in", tmp_path / "out"), "none of the 1 images can be decoded", "a.jpg")
    assert not list(tmp_path.glob("out*"))


def test_an_existing_folder_is_replaced_only_on_demand_and_only_by_a_complete_one(classes, tmp_path):
    out = tmp_path / "out"
    assert pack(classes, out).returncode == 0
    before = digests(out)
    refused(pack(classes, out, "--seed", 5), "exists already", "--overwrite")
    refused(pack(tmp_path / "nowhere", out, "--overwrite"), "is not a folder")
    (classes / "cat" / "bad.png").write_bytes(b"x")
    refused(pack(classes, out, "--overwrite", "--max-bad", 0), "cannot be decoded")
    assert digests(out) == before
    assert pack(classes, out, "--overwrite", "--seed", 5).returncode == 0
    assert digests(out) != before and sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(pack(classes, tmp_path / "mine", "--overwrite"), "is no packed data set")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_killed_pack_leaves_nothing_that_looks_finished(tmp_path):
    noise = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(150):
        Image.fromarray(noise.integers(0, 255, (256, 256, 3), np.uint8)).save(
            tmp_path / "in" / f"{i}.png", compress_level=0
        )
    arguments = [sys.executable, "-m", "data.pack", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-size", "10"]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out.partial/*-000002.tar")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    with pytest.raises(DataError):
        open_shards(tmp_path / "out")
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "left over by a pack that was interrupted" in again.stderr
    assert len(open_shards(tmp_path / "out")) == 150 and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["c/a.b.png", "c/a_b.png"], "would both get the key c/a_b"),
        (["c/x.jpg", "c/x.png"], "would both get the key c/x"),
        (["train/c/x.png", "val/c/y.png"], "is a split and no class"),
        (["c/x.png", "y.png"], "both class folders"),
        (["x.txt"], "holds no image among its 1 files"),
    ],
)
def test_an_ambiguous_folder_is_refused(tmp_path, files, says):
    for name in files:
        if name.endswith(".txt"):
            (tmp_path / name).write_text("")
        else:
            image(tmp_path / name)
    with pytest.raises(DataError, match=says):
        find_images(tmp_path)


def test_hidden_files_are_not_looked_at(tmp_path):
    for name in ("a.png", "._a.png", ".cache/b.png"):
        image(tmp_path / name)
    samples, classes, ignored = find_images(tmp_path)
    assert [sample.key for sample in samples] == ["a"] and not classes and not ignored


def test_long_names_and_percent_signs(tmp_path):
    for name in ("n" * 150, "größe"):
        image(tmp_path / "in" / f"{name}.png")
    ended = pack(tmp_path / "in", tmp_path / "100%d")
    assert ended.returncode == 0, ended.stderr
    index = open_shards(tmp_path / "100%d")
    assert {index.key(0), index.key(1)} == {"größe", "n" * 150}
