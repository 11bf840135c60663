"""Packing: what is written, from which sources, what is refused, and what an interruption leaves."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.errors import DataError, command
from data.images.decode import image_size
from data.index.build import build
from data.index.index import open_shards
from data.pack.__main__ import main
from data.pack.image_folder import find_images
from data.pack.writer import digest_of, read_back
from data.storage.read import read
from tests.test_index import write_tar

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def pack(*arguments: object, jobs: int = 1) -> Ended:
    """Runs the command in this process: a new one would spend its time on importing torch."""
    words = [*map(str, arguments), "--jobs", str(jobs)]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            command(lambda: main(words))
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


def test_folder_of_classes_packs_to_shards_with_labels_and_a_manifest(classes, tmp_path):
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
def test_webdataset_reads_the_packed_shards(classes, tmp_path):
    assert pack(classes, tmp_path / "out").returncode == 0
    index = open_shards(tmp_path / "out")
    samples = list(webdataset.WebDataset(index.shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 20
    for sample, found in enumerate(samples):
        assert found["__key__"] == index.key(sample) and found["cls"] == index.label(sample)
        picture = next(found[extension] for extension in ("jpg", "png", "jpeg") if extension in found)
        assert picture.size == (16, 12)


def test_pack_with_equal_seeds_writes_equal_bytes(classes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert pack(classes, tmp_path / name, "--name", "x", "--seed", seed).returncode == 0
        time.sleep(0.01)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")
    fingerprints = [json.loads((tmp_path / name / "manifest.json").read_text())["fingerprint"] for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_flat_folder_packs_without_labels_and_named_after_its_data_set(tmp_path):
    for i in range(5):
        image(tmp_path / "flat" / f"my picture.v{i}.png", i)
    assert pack(tmp_path / "flat", tmp_path / "pets" / "train").returncode == 0
    index = open_shards(tmp_path / "pets", "train")
    assert os.path.basename(index.shards[0]) == "pets-train-000000.tar"
    assert sorted(index.key(i) for i in range(5)) == [f"my_picture_v{i}" for i in range(5)]
    assert {index.label(i) for i in range(5)} == {-1}


def test_unreadable_images_are_listed_and_left_out_up_to_max_bad(classes, tmp_path):
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
    assert not (tmp_path / "out2").exists()
    assert pack(classes, tmp_path / "out2", "--max-bad", 2).returncode == 0
    assert not (tmp_path / "out2.partial").exists()


def test_pack_without_a_readable_image_ends_with_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"nothing")
    refused(pack(tmp_path / "in", tmp_path / "out"), "none of the 1 images can be used", "a.jpg")
    assert not list(tmp_path.glob("out*"))


def test_overwrite_replaces_a_packed_folder_only_by_a_complete_one(classes, tmp_path):
    out = tmp_path / "out"
    assert pack(classes, out).returncode == 0
    before = digests(out)
    refused(pack(classes, out, "--seed", 5), "exists already", "--overwrite")
    refused(pack(tmp_path / "nowhere", out, "--overwrite"), "does not exist")
    (classes / "cat" / "bad.png").write_bytes(b"x")
    refused(pack(classes, out, "--overwrite", "--max-bad", 0), "cannot be decoded")
    assert digests(out) == before
    assert pack(classes, out, "--overwrite", "--seed", 5).returncode == 0
    assert digests(out) != before and sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(pack(classes, tmp_path / "mine", "--overwrite"), "is no packed data set")
    assert (tmp_path / "mine" / "thesis.txt").exists()


# Interrupted, in processes, in parts


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """150 images without compression, which take about two seconds: there is time to interrupt that."""
    noise = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("many") / "in"
    folder.mkdir()
    for i in range(150):
        pixels = noise.integers(0, 255, (384, 384, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)
    return folder


@pytest.fixture(scope="module")
def packed(many, tmp_path_factory) -> dict[str, str]:
    """Returns the shards that an uninterrupted pack of them gives."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert pack(many, out, "--shard-size", 10).returncode == 0
    return digests(out)


def start(*arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "data.pack", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c)


def _heed_ctrl_c() -> None:
    # What a shell starts in the background ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen) -> None:
    while not list(folder.glob(pattern)) and process.poll() is None:
        time.sleep(0.002)


def stamps(folder: Path) -> dict[str, int]:
    """When each shard that is on record was written."""
    return {
        record.stem: (folder / f"{record.stem}.tar").stat().st_mtime_ns for record in folder.glob(".pack/out-*.json")
    }


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_pack_resumes_and_keeps_its_finished_shards(many, packed, tmp_path, jobs):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(many, out, "--shard-size", 10, "--jobs", jobs)
    wait_for(".pack/*-000002.json", partial, process)
    while len(stamps(partial)) < 3:  # of two workers one may be behind with the shard before
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    with pytest.raises(DataError):
        open_shards(out)
    time.sleep(0.5)  # For its workers to notice.
    before = stamps(partial)
    assert 3 <= len(before) < 15
    refused(pack(many, out, "--shard-size", 10, "--seed", 4), "--seed 0, where now it is 4", "--overwrite")
    refused(pack(many, out), "--shard-size 10, where now it is 1000")
    again = pack(many, out, "--shard-size", 10)
    assert again.returncode == 0 and f"{len(before)} of 15 shards are finished" in again.stderr
    assert digests(out) == packed and not partial.exists()
    assert {path.suffix for path in out.iterdir()} == {".tar", ".idx", ".bin", ".json"}
    for name, stamp in before.items():
        assert (out / f"{name}.tar").stat().st_mtime_ns == stamp


def test_overwrite_discards_an_unfinished_pack_of_another_source(many, classes, packed, tmp_path):
    (tmp_path / "bad").mkdir()
    image(tmp_path / "bad" / "a.png")
    (tmp_path / "bad" / "b.png").write_bytes(b"")
    refused(pack(tmp_path / "bad", tmp_path / "out", "--max-bad", 0), "1 images cannot be decoded")
    refused(pack(many, tmp_path / "out"), "2 samples, where the source now has 150", "--overwrite")
    assert pack(many, tmp_path / "out", "--shard-size", 10, "--overwrite").returncode == 0
    assert digests(tmp_path / "out") == packed
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("precious")
    refused(pack(classes, tmp_path / "new", "--overwrite"), "holds no plan")


def test_damaged_shards_are_not_merged_and_are_packed_again(classes, tmp_path):
    assert pack(classes, tmp_path / "one", "--name", "x", "--shard-size", 5).returncode == 0
    for part in (1, 2):
        assert pack(classes, tmp_path / "two", "--name", "x", "--shard-size", 5, "--part", f"{part}/2").returncode == 0
    partial = tmp_path / "two.partial"
    os.truncate(partial / "x-000001.tar", 512)
    with open(partial / "x-000002.tar", "r+b") as file:
        file.seek(600)
        file.write(b"?")
    merge = (classes, tmp_path / "two", "--name", "x", "--shard-size", 5, "--merge")
    refused(pack(*merge), "lacks 1 of the 4 shards of --part 2/2: x-000001.tar")
    assert pack(*merge[:-1], "--part", "2/2").returncode == 0
    refused(pack(*merge), "x-000002.tar is damaged: its sha256 is")
    (partial / "x-000002.tar").unlink()
    assert pack(*merge[:-1]).returncode == 0
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_read_back_of_a_shard_that_differs_raises_data_error(tmp_path):
    data = image(tmp_path / "a.png").read_bytes()
    index = build(str(write_tar(tmp_path / "x.tar", {"a.png": data, "a.cls": b"3"})))
    meant = [("a.png", len(data), digest_of(data)), ("a.cls", 1, digest_of(b"3"))]
    read_back(index, meant)
    for wrong in (meant[:1], meant[::-1], [meant[0], ("a.cls", 1, digest_of(b"4"))]):
        with pytest.raises(DataError, match="does not hold what was written"):
            read_back(index, wrong)


def test_pack_in_three_processes_writes_the_bytes_of_one(many, packed, tmp_path):
    ended = pack(many, tmp_path / "out", "--shard-size", 10, jobs=3)
    assert ended.returncode == 0, ended.stderr
    assert digests(tmp_path / "out") == packed


def test_pack_on_a_full_disk_ends_with_an_error_and_resumes(many, packed, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        ended = pack(many, tmp_path / "out", "--shard-size", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(ended, "out.partial cannot be written (File too large)", "repeat the command")
    assert pack(many, tmp_path / "out", "--shard-size", 10).returncode == 0
    assert digests(tmp_path / "out") == packed


def test_pack_stopped_by_ctrl_c_exits_with_130_and_resumes(many, packed, tmp_path):
    out = tmp_path / "out"
    process = start(many, out, "--shard-size", 10, "--jobs", 2)
    wait_for(".pack/*-000000.json", tmp_path / "out.partial", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said and "repeat the command to resume" in said
    assert not out.exists()
    assert pack(many, out, "--shard-size", 10).returncode == 0 and digests(out) == packed


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_killed_pack_worker_ends_the_pack_with_an_error(many, tmp_path):
    process = start(many, tmp_path / "out", "--shard-size", 10, "--jobs", 2)
    wait_for("*.tmp", tmp_path / "out.partial", process)
    workers = [worker for child in children(process.pid) for worker in children(child)]
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate()
    refused(Ended(process.returncode, "", said), "a worker process was killed", "fewer --jobs")


def test_parts_and_merge_write_the_bytes_of_one_call(many, packed, tmp_path):
    out, size = tmp_path / "out", ("--shard-size", 10)
    refused(pack(many, out, *size, "--merge"), "holds no unfinished pack")
    for part in ("3/3", "1/3"):
        ended = pack(many, out, *size, "--part", part)
        assert ended.returncode == 0 and "--merge" in ended.stdout
    assert not out.exists() and len(stamps(tmp_path / "out.partial")) == 10
    refused(pack(many, out, *size, "--merge"), "lacks 5 of the 15 shards of --part 2/3", "out-000001.tar", "out-000004")
    refused(pack(many, out, "--part", "2/3"), "--shard-size 10, where now it is 1000", "before the parts are started")
    assert pack(many, out, *size, "--part", "2/3").returncode == 0
    refused(pack(many, out, *size, "--seed", 1, "--merge"), "--seed 0, where now it is 1")
    ended = pack(many, out, *size, "--merge")
    assert ended.returncode == 0 and "150 samples in 15 shards" in ended.stdout
    assert digests(out) == packed


def test_merge_counts_unreadable_images_over_all_parts(classes, tmp_path):
    for name in ("cat/x.png", "dog/y.png", "owl/z.png"):
        (classes / name).write_bytes(b"broken")
    words = (classes, tmp_path / "out", "--shard-size", 3, "--max-bad", 2)
    codes = [pack(*words, "--part", f"{part}/8").returncode for part in range(1, 9)]
    assert set(codes) == {0}
    refused(pack(*words, "--merge"), "3 images cannot be decoded, more than --max-bad 2")
    assert pack(*words[:-1], 3, "--merge").returncode == 0
    assert len(open_shards(tmp_path / "out")) == 20


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b"])
def test_invalid_part_exits_with_2_and_an_error(classes, tmp_path, part):
    ended = pack(classes, tmp_path / "out", "--part", part)
    assert ended.returncode == 2 and f"{part} is not I/N with I from 1 to N" in ended.stderr


# Smaller images


def sample_images(folder: Path) -> dict[str, bytes]:
    index = open_shards(folder)
    found = {}
    for sample in range(len(index)):
        number, offset, size = index.locate(sample)
        found[index.key(sample)] = read(index.shards[number], offset, size)
    return found


def test_shorter_side_scales_down_larger_photographs_only(real_images, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("lamps_2048x1536_exif6", "saw_2725x2225"):
        (photos / f"{name}.jpg").symlink_to(real_images / "large_photos" / f"{name}.jpg")
    small = Image.effect_noise((300, 200), 50)
    small.save(photos / "small.png")
    Image.effect_noise((1100, 900), 50).save(photos / "grey.png")
    ended = pack(photos, tmp_path / "out", "--shorter-side", 512)
    assert ended.returncode == 0 and "3 encoded anew with a shorter side of 512" in ended.stdout, ended.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["shorter_side"], manifest["quality"], manifest["reencoded"]) == (512, 90, 3)
    images = sample_images(tmp_path / "out")
    assert images["small"] == (photos / "small.png").read_bytes()
    assert image_size(images["lamps_2048x1536_exif6"]) == (683, 512)  # Upright: it was taken with a turned camera.
    assert image_size(images["saw_2725x2225"]) == (512, 627)
    with Image.open(io.BytesIO(images["grey"])) as grey:
        assert (grey.format, grey.mode, grey.size) == ("JPEG", "L", (626, 512))
    with Image.open(photos / "saw_2725x2225.jpg") as whole:
        expected = np.asarray(whole.resize((627, 512), Image.Resampling.LANCZOS), float)
    with Image.open(io.BytesIO(images["saw_2725x2225"])) as found:
        error = np.mean((np.asarray(found, float) - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > 35  # dB, of which JPEG of quality 90 alone costs most (38.5).


def test_shorter_side_stores_exif_rotated_images_upright(real_images, tmp_path):
    folder = real_images / "large_photos" / "exif_orientation"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} does not exist")
    assert pack(folder, tmp_path / "out", "--shorter-side", 128, "--quality", 95).returncode == 0
    pictures = []
    for data in sample_images(tmp_path / "out").values():
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.getexif().get(0x0112, 1) == 1
            pictures.append(np.asarray(picture.convert("L").resize((64, 48)), float))
    assert len(pictures) == 8
    assert all(np.corrcoef(pictures[0].ravel(), other.ravel())[0, 1] > 0.98 for other in pictures)


def test_quality_without_shorter_side_ends_with_an_error(classes, tmp_path):
    refused(pack(classes, tmp_path / "out", "--quality", 80), "--quality 80 has no effect without --shorter-side")


# Other sources


def test_side_files_are_packed_with_their_image(tmp_path):
    for name in ("a.jpg", "a.b.jpg", "c.png"):
        image(tmp_path / "in" / name)
    sides = {"a.json": b"{}", "a.b.seg.txt": b"of a.b", "c.cls": b"4", "README.md": b"?", "a.c.txt": b"of a"}
    for name, contents in sides.items():
        (tmp_path / "in" / name).write_bytes(contents)
    ended = pack(tmp_path / "in", tmp_path / "out")
    assert ended.returncode == 0 and "1 files" in ended.stderr, ended.stderr
    index = open_shards(tmp_path / "out")
    members = {member.name: read(index.shards[0], *member[1:]) for i in range(3) for member in index.members(i)}
    assert {name: data for name, data in members.items() if not name.endswith(("jpg", "png"))} == {
        "a.json": b"{}",
        "a.c.txt": b"of a",
        "a_b.seg.txt": b"of a.b",
        "c.cls": b"4",
    }
    assert {index.key(i): index.label(i) for i in range(3)} == {"a": -1, "a_b": -1, "c": 4}


def test_second_label_of_an_image_ends_with_an_error(classes, tmp_path):
    (classes / "cat" / "cat0.cls").write_text("3")
    refused(pack(classes, tmp_path / "out"), "cat0.cls would give its image a second label")


def test_packing_tars_of_masks_keeps_all_members(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))
    source = real_images / "coco_sa1b" / "coco_sa1b-val-000000.tar"
    ended = pack(source, tmp_path / "out", "--shard-size", 20, "--shorter-side", 400)
    assert ended.returncode == 0, ended.stderr
    index = open_shards(tmp_path / "out")
    found = {
        member.name: read(index.shards[index.locate(i)[0]], member.offset, member.size)
        for i in range(len(index))
        for member in index.members(i)
    }
    with tarfile.open(source) as tar:
        expected = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert found.keys() == expected.keys() and len(index) == len(expected) // 2
    for name, contents in expected.items():
        if name.endswith(".json"):
            assert found[name] == contents
        else:
            assert min(image_size(found[name])) == min(400, *image_size(contents))


def test_packing_shards_again_keeps_bytes_labels_and_classes(classes, tmp_path):
    assert pack(classes, tmp_path / "one", "--shard-size", 6).returncode == 0
    assert pack(tmp_path / "one", tmp_path / "two", "--seed", 9, jobs=2).returncode == 0
    assert sample_images(tmp_path / "one") == sample_images(tmp_path / "two")
    one, two = open_shards(tmp_path / "one"), open_shards(tmp_path / "two")
    assert {one.key(i): one.label(i) for i in range(20)} == {two.key(i): two.label(i) for i in range(20)}
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["classes"] == ["cat", "dog", "owl"]
    third = pack(f"{tmp_path}/one/*-00000{{0..2}}.tar", tmp_path / "three")
    assert third.returncode == 0 and "18 samples" in third.stdout


def test_key_in_two_tars_ends_with_an_error_naming_both(classes, tmp_path):
    for name in ("a", "b"):
        assert pack(classes, tmp_path / "in" / name, "--shard-size", 50).returncode == 0
    ended = pack(f"{tmp_path}/in/*/*.tar", tmp_path / "out")
    refused(ended, "a-000000.tar/", "b-000000.tar/", "would both get the key")


def test_folder_of_two_splits_ends_with_an_error(classes, tmp_path):
    for part in ("train", "val"):
        assert pack(classes / "cat", tmp_path / "pets" / part).returncode == 0
    refused(pack(tmp_path / "pets", tmp_path / "out"), "holds the parts train and val", "Pack each on its own")


def test_csv_list_packs_its_images_with_their_labels(classes, tmp_path):
    lines = [f"images/{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(classes.glob("*/*"))]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    assert pack(tmp_path / "list.csv", tmp_path / "out").returncode == 0
    index = open_shards(tmp_path / "out")
    names = json.loads((tmp_path / "out" / "manifest.json").read_text())["classes"]
    assert names == ["cat", "dog", "owl"] and len(index) == 20
    assert all(f"images/{names[index.label(i)]}/" in index.key(i) for i in range(20))
    (tmp_path / "numbers.csv").write_text("path,label\nimages/cat/cat0.jpg,7\nimages/dog/dog0.jpg,2\n")
    assert pack(tmp_path / "numbers.csv", tmp_path / "out2").returncode == 0
    index = open_shards(tmp_path / "out2")
    assert {index.key(i): index.label(i) for i in range(2)} == {"images/cat/cat0": 7, "images/dog/dog0": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,label\na.jpg,1\n", "begins with the line 'file,label'"),
        ("path,label\na.jpg,1\nb.jpg\n", "line 3, does not have 2 fields"),
        ("path\na.pdf\n", "'a.pdf' is no image"),
        ("path\n", "lists no image"),
        ("path\na.jpg\na.png\n", "would both get the key a"),
        ("path\n\xff.jpg\n", "is no CSV file in UTF-8"),
    ],
)
def test_invalid_csv_list_ends_with_an_error(tmp_path, text, says):
    (tmp_path / "list.csv").write_text(text, encoding="latin-1")
    refused(pack(tmp_path / "list.csv", tmp_path / "out"), says)


def test_packing_tars_keeps_awkward_member_names(tmp_path):
    data = image(tmp_path / "a.png").read_bytes()
    files = {
        "./two words.png": data,
        "./two words.large.json": b"{}",
        "é/x.JPEG": data,
        "é/x._meta": b"m",
        "y.a b": b"?",
    }
    write_tar(tmp_path / "in.tar", files | {"y.png": data})
    assert pack(tmp_path / "in.tar", tmp_path / "out").returncode == 0
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert found == files | {"y.png": data}


def test_unsupported_source_ends_with_an_error(tmp_path):
    image(tmp_path / "both" / "cat" / "a.png")
    write_tar(tmp_path / "both" / "x.tar", {"a.txt": b""})
    refused(pack(tmp_path / "both", tmp_path / "out"), "holds both tars", "x.tar", "a.png")
    refused(pack(tmp_path / "both" / "cat", tmp_path / "out", "--image", ".PNG"), "--image png is for tars")
    (tmp_path / "book.pdf").write_text("")
    refused(pack(tmp_path / "book.pdf", tmp_path / "out"), "book.pdf is not a folder of images, nor tars, nor a CSV")


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
def test_ambiguous_folder_ends_with_an_error(tmp_path, files, says):
    for name in files:
        if name.endswith(".txt"):
            (tmp_path / name).write_text("")
        else:
            image(tmp_path / name)
    refused(pack(tmp_path, tmp_path.parent / f"{tmp_path.name}.out"), says)


def test_hidden_files_and_folders_are_not_packed(tmp_path):
    for name in ("a.png", "._a.png", ".cache/b.png"):
        image(tmp_path / name)
    samples, classes, ignored, _ = find_images(tmp_path)
    assert [sample.key for sample in samples] == ["a"] and not classes and not ignored


def test_long_and_non_ascii_names_and_percent_signs_are_packed(tmp_path):
    for name in ("n" * 150, "größe"):
        image(tmp_path / "in" / f"{name}.png")
    ended = pack(tmp_path / "in", tmp_path / "100%d")
    assert ended.returncode == 0, ended.stderr
    index = open_shards(tmp_path / "100%d")
    assert {index.key(0), index.key(1)} == {"größe", "n" * 150}


# Parts of one folder


def parts_of(out: Path) -> dict[str, set[str]]:
    """Returns the keys of each part of a packed folder."""
    found = {}
    for part in ("train", "val", "test"):
        if (out / part).exists():
            index = open_shards(out, part)
            found[part] = {index.key(sample) for sample in range(len(index))}
    return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """240 images of 24 scenes in folders, with a list that names a patient, seen in two scenes each."""
    folder = tmp_path_factory.mktemp("scenes")
    lines = ["path,label,patient"]
    for scene in range(24):
        for number in range(10):
            path = image(folder / "in" / f"scene{scene:02d}" / f"{number}.png", scene * 10 + number)
            lines.append(f"{path.relative_to(folder)},{'ab'[number % 2]},p{scene // 2}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_parts_by_hash_keep_each_image_where_it_is_when_others_are_added(scenes, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(scenes / "in", source)
    ended = pack(source, tmp_path / "out", "--val", 0.2, "--test", 0.1, "--shard-size", 50)
    assert ended.returncode == 0, ended.stderr
    before = parts_of(tmp_path / "out")
    assert f"{tmp_path}/out/val: {len(before['val'])} samples in 1 shards" in ended.stdout
    assert [len(keys) for keys in before.values()] == pytest.approx([168, 48, 24], abs=18)
    assert len(set.union(*before.values())) == 240
    manifest = json.loads((tmp_path / "out" / "val" / "manifest.json").read_text())
    assert manifest["divided_by"] == {"val": 0.2, "test": 0.1, "val_per_class": None, "group_by": None}
    assert [shard["file"] for shard in manifest["shards"]] == ["out-val-000000.tar"] and manifest["name"] == "out-val"
    for number in range(40):
        image(source / "more" / f"{number}.png", number)
    assert pack(source, tmp_path / "new", "--val", 0.2, "--test", 0.1, "--seed", 9).returncode == 0
    after = parts_of(tmp_path / "new")
    assert all(before[part] <= after[part] for part in before)
    assert pack(source, tmp_path / "wider", "--val", 0.4).returncode == 0
    assert after["val"] < parts_of(tmp_path / "wider")["val"]


@pytest.mark.parametrize("source", ["in", "list.csv"])
def test_groups_of_a_folder_or_a_column_stay_in_one_part(scenes, tmp_path, source):
    by = {"in": "folder", "list.csv": "patient"}[source]
    ended = pack(scenes / source, tmp_path / "out", "--val", 0.3, "--test", 0.2, "--group-by", by)
    assert ended.returncode == 0, ended.stderr
    patients = {f"scene{scene:02d}": f"p{scene // 2}" for scene in range(24)}
    folders = {part: {key.split("/")[-2] for key in keys} for part, keys in parts_of(tmp_path / "out").items()}
    groups = {part: names if by == "folder" else {patients[name] for name in names} for part, names in folders.items()}
    assert set(groups) == {"train", "val", "test"} and all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    # A scene is a class of the folder, so that classes of val are none of train; the list has two classes everywhere.
    assert ("classes have no image in train, since groups stay whole: scene" in ended.stderr) == (by == "folder")


def test_val_per_class_takes_as_many_images_of_each_class(classes, tmp_path):
    assert pack(classes, tmp_path / "out", "--val-per-class", 2).returncode == 0
    index = open_shards(tmp_path / "out", "val")
    assert np.bincount(index.labels).tolist() == [2, 2, 2] and len(open_shards(tmp_path / "out", "train")) == 14
    assert pack(tmp_path / "out" / "train", tmp_path / "again", "--val-per-class", 1).returncode == 0  # labels in tars
    assert np.bincount(open_shards(tmp_path / "again", "val").labels).tolist() == [1, 1, 1]
    refused(pack(classes, tmp_path / "no", "--val-per-class", 5), "no image of the class dog for training: it has 5")


def test_divided_pack_in_parts_resumed_and_merged_writes_the_bytes_of_one_call(scenes, tmp_path):
    words = (scenes / "in", tmp_path / "out", "--val", 0.2, "--shard-size", 40, "--name", "x")
    assert pack(scenes / "in", tmp_path / "one", *words[2:]).returncode == 0
    assert pack(*words, "--part", "2/2").returncode == 0
    refused(pack(*words[:2], "--val", 0.1, *words[4:]), "--val 0.2, where now it is 0.1")
    refused(pack(*words, "--merge"), "lacks", "train/x-train-000000.tar")
    assert pack(*words, "--part", "1/2").returncode == 0 and pack(*words, "--merge").returncode == 0
    assert not (tmp_path / "out.partial").exists() and sorted(os.listdir(tmp_path / "out")) == ["train", "val"]
    for part in ("train", "val"):
        assert digests(tmp_path / "out" / part) == digests(tmp_path / "one" / part) != {}
    refused(pack(*words), "exists already")
    assert pack(*words, "--overwrite", "--seed", 1).returncode == 0
    assert digests(tmp_path / "out" / "val") != digests(tmp_path / "one" / "val")
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    refused(pack(*words, "--overwrite"), "is no packed data set")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--val", 0.6, "--test", 0.4], "leave nothing for training"),
        (["--group-by", "folder"], "has no effect without --val or --test"),
        (["--val", 0.1, "--group-by", "patient"], "names a column, and"),
        (["--val-per-class", 1, "--group-by", "folder"], "keeps groups whole"),
        (["--val", 0.001], "the part val would have none of the 20 images"),
        (["--val", 0.999], "the part train would have none of the 20 images"),
    ],
)
def test_division_that_cannot_be_ends_with_an_error(classes, tmp_path, words, says):
    refused(pack(classes, tmp_path / "out", *words), says)
    assert not list(tmp_path.glob("out*"))


def test_division_into_a_folder_called_train_ends_with_an_error(classes, tmp_path):
    refused(pack(classes, tmp_path / "pets" / "train", "--val", 0.1), "is called after a part", f"Give {tmp_path}/pets")


@pytest.mark.parametrize(
    ("header", "row", "by", "says"),
    [
        ("path,patient", "a.png,", "patient", "line 2, does not have 2 fields"),
        ("path,label", "a.png,x", "patient", "--group-by patient is no column"),
        ("path,age,patient", "a.png,3,p", "patient", "begins with the line 'path,age,patient'"),
    ],
)
def test_list_without_the_column_of_groups_ends_with_an_error(tmp_path, header, row, by, says):
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n")
    refused(pack(tmp_path / "list.csv", tmp_path / "out", "--val", 0.5, "--group-by", by), says)
