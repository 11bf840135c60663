"""Shards behind URLs, read from real servers on loopback."""

import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image
from pydantic import ValidationError

import train
from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.index.index import open_shards
from data.index.splits import find_shards, has_split
from data.loader.prefetch import Prefetcher
from data.pack.image_folder import find_images
from data.pack.pack import pack
from data.storage import credentials
from data.storage.cache import ShardCache
from data.storage.credentials import hide, pass_on, reveal
from data.storage.in_use import Pins
from data.storage.protocols import Retry
from data.storage.read import read
from mae.report.page import write_report
from tasks.cli import run_program
from tasks.config import evaluation_data
from tests.processes import SMALL, completed, run
from tests.servers import FileServer, serving
from tests.test_stream import batches_equal

QUICK = Retry(attempts=6, first=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """64 images in 8 shards of about 80 KB with a val part of 8."""
    root = tmp_path_factory.mktemp("remote")
    noise = np.random.default_rng(0)
    for part, number in (("train", 64), ("val", 8)):
        for i in range(number):
            path = root / "images" / part / f"class{i % 3}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 255, (50 + i % 7, 60, 3), np.uint8)).save(path)
        samples, classes, *_ = find_images(root / "images" / part)
        pack(samples, root / "packed" / part, name=f"x-{part}", classes=classes, shard_size=8)
    return root / "packed"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def s3():
    """An S3 server with the empty bucket `shards`, to which the environment points."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield names["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3, folder) -> str:
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("shards")
    files.put(str(folder), "shards/packed", recursive=True)
    return "s3://shards/packed"


def bare(folder: Path, out: Path) -> Path:
    """Copies the shards alone, without indexes and manifests."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.idx", "*.idx.bin", "manifest.json"))
    return out


def module(path, **changes) -> ShardDataModule:
    config = DataConfig(path=path if isinstance(path, list) else str(path), **{"workers": 0, "window": 3, **changes})
    return ShardDataModule(config, image_size=(24, 24), channels=3, seed=3, global_batch=16, micro_batch=8)


def equal_pairs(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def batches(data: ShardDataModule) -> list:
    return list(data.train_loader(lambda: 0))


# The same batches as from a local disk


@pytest.mark.parametrize("workers", [0, 2])
def test_s3_gives_the_batches_of_the_local_disk(folder, bucket, workers):
    local, remote = module(folder), module(bucket, workers=workers)
    assert remote.identity == local.identity
    assert batches_equal(batches(remote), batches(local))
    assert remote.val_index is not None and local.val_index is not None
    assert batches_equal(remote.val_dataloader(), local.val_dataloader())


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_batches_of_the_local_disk(folder, tmp_path, workers, ranges):
    local = module(folder)
    with serving(bare(folder, tmp_path / "bare"), ranges=ranges) as server:
        urls = [f"{server.url}/train/x-train-{{000000..000007}}.tar"]
        remote = module(urls, workers=workers, val_path=f"{server.url}/val/x-val-000000.tar")
        assert remote.identity == local.identity
        assert batches_equal(batches(remote), batches(local))


def test_second_start_downloads_nothing(folder, bucket):
    with serving(folder) as server:
        for url in (bucket, server.url):
            assert len(batches(module(url, workers=2))) == 8
            copies = {path: path.stat().st_ino for path in Path(ShardCache().shards).glob("*/*.tar")}
            downloads = server.downloads()
            data = module([f"{url}/train/x-train-{{000000..000007}}.tar"], workers=1)
            assert len(batches(data)) == 8 and server.downloads() == downloads
            assert {path: path.stat().st_ino for path in copies} == copies


def test_examples_are_read_without_downloading_whole_shards(folder, bucket):
    with serving(folder) as server:
        for url in (bucket, server.url):
            examples = module(f"{url}/train").examples(5)
            assert equal_pairs(examples, module(folder / "train").examples(5))
            assert not cached(ShardCache())
    with serving(folder, ranges=False) as server:
        assert equal_pairs(module(f"{server.url}/train").examples(5), examples)


def test_reads_survive_transient_server_errors(folder, tmp_path):
    faults = ["drop", "truncate", "503", "429", None, None]
    with serving(folder, fault=lambda method, path, number: faults[(number + len(path)) % 6]) as server:
        cache = ShardCache(retry=Retry(attempts=10, first=0.01))
        index = open_shards(f"{server.url}/train/x-train-{{000000..000007}}.tar", cache=cache)
        local = open_shards(folder / "train")
        for sample in range(64):
            shard, offset, size = local.locate(sample)
            assert read(index.shards[shard], offset, size, cache) == read(local.shards[shard], offset, size)
            assert (index.key(sample), index.label(sample)) == (local.key(sample), local.label(sample))


# What a URL means


def names(shards: list[str]) -> list[str]:
    return [shard.rpartition("/")[2] for shard in shards]


def test_remote_folders_globs_and_braces_find_their_shards(folder, bucket):
    train = [f"x-train-{i:06d}.tar" for i in range(8)]
    with serving(folder) as server:
        for base in (bucket, server.url):
            assert names(find_shards(base, "train")) == names(find_shards(f"{base}/train/")) == train
            assert names(find_shards(f"{base}/train/x-train-{{000000..000007}}.tar")) == train
            assert has_split(base, "val") and not has_split(base, "test")
            with pytest.raises(DataError, match="has no test part, only train and val"):
                find_shards(base, "test")
            with pytest.raises(DataError, match="mixes the splits"):
                find_shards([f"{base}/train", f"{base}/val/x-val-000000.tar"])
        assert names(find_shards(f"{bucket}/train/*")) == names(find_shards(f"{bucket}/t*n/x-*.tar")) == train
        with pytest.raises(DataError, match="as far as the server lists its files"):
            find_shards(f"{server.url}/train/*.tar")
        with pytest.raises(DataError, match=r"has no manifest\.json that lists shards"):
            find_shards(f"{server.url}/nowhere")


def test_missing_protocol_package_raises_data_error_naming_the_install_command():
    if any(Path(path, "gcsfs").exists() for path in sys.path):
        pytest.skip("gcsfs is installed")
    with pytest.raises(DataError, match=r"needs the package gcsfs.*pip install 'gcsfs'"):
        find_shards("gs://bucket/x.tar")


def test_index_command_indexes_remote_shards(folder, tmp_path):
    with serving(bare(folder, tmp_path / "bare")) as server:
        command = [sys.executable, "-m", "data.index", f"{server.url}/train/x-train-{{000000..000007}}.tar"]
        ended = completed(command)
    assert ended.returncode == 0, ended.stderr
    fingerprint = json.loads((folder / "train" / "manifest.json").read_text())["fingerprint"]
    assert f"8 shards, 64 samples, fingerprint {fingerprint[:16]}" in ended.stdout


# Indexes


def test_index_beside_a_remote_shard_is_used(folder):
    with serving(folder) as server:
        assert len(open_shards(f"{server.url}/train")) == 64
        assert not server.downloads()
        before = server.asked.total()
        open_shards(f"{server.url}/train/x-train-000000.tar")
        assert server.asked.total() - before <= 3  # The second time one question, whether the shard is still the same.


@pytest.mark.parametrize("ranges", [True, False])
def test_indexing_skips_large_members_if_the_server_sends_ranges(tmp_path, ranges):
    for i in range(4):
        path = tmp_path / "in" / f"{i}.ppm"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (1000, 1000)).save(path)
    pack(find_images(tmp_path / "in")[0], tmp_path / "out", name="x", classes=[])
    with serving(bare(tmp_path / "out", tmp_path / "bare"), ranges=ranges) as server:
        index = open_shards(f"{server.url}/x-000000.tar")
        assert index.fingerprint == open_shards(tmp_path / "out").fingerprint
        assert server.sent < 2_000_000 < index.bytes[0] if ranges else len(cached(index.cache)) == 1


def test_changed_remote_shard_is_indexed_and_downloaded_again(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "bare")
    with serving(tmp_path / "bare") as server:
        first, second = (open_shards(tmp_path / "bare" / f"x-train-00000{i}.tar") for i in range(2))
        url = f"{server.url}/x-train-000000.tar"
        assert open_shards(url).locate(7) == first.locate(7) != second.locate(7)
        path = ShardCache().fetch(url)
        for ending in (".tar", ".idx", ".idx.bin"):
            shutil.copy(tmp_path / "bare" / f"x-train-000001{ending}", tmp_path / "bare" / f"x-train-000000{ending}")
        (tmp_path / "bare" / "manifest.json").unlink()
        assert open_shards(url).key(0) == second.key(0)
        assert not os.path.exists(path)
        assert Path(ShardCache().fetch(url)).read_bytes() == Path(second.shards[0]).read_bytes()


# The cache


def fetch_all(urls: list[str]) -> None:
    for url in urls:
        ShardCache(retry=QUICK).fetch(url)


def test_concurrent_processes_download_a_shard_once(folder):
    with serving(folder / "train", fault=lambda *request: time.sleep(0.02)) as server:
        urls = [f"{server.url}/x-train-{i:06d}.tar" for i in range(8)]
        ShardCache().fetch(urls[0])  # So that there is an event loop which does not survive the fork.
        processes = [multiprocessing.get_context("fork").Process(target=fetch_all, args=(urls,)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert server.downloads() == {f"/x-train-{i:06d}.tar": 1 for i in range(8)}


def test_download_of_a_killed_process_is_started_again(folder):
    slow = threading.Event()

    def fault(method: str, path: str, number: int) -> None:
        if method == "GET" and path.endswith(".tar") and number == 1:
            slow.set()
            time.sleep(1)

    with serving(folder / "train", fault=fault) as server:
        urls = [f"{server.url}/x-train-000000.tar"]
        process = multiprocessing.get_context("fork").Process(target=fetch_all, args=(urls,))
        process.start()
        assert slow.wait(120)
        process.kill()
        process.join()
        assert os.path.getsize(ShardCache().fetch(urls[0])) == (folder / "train/x-train-000000.tar").stat().st_size


def cached(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in Path(cache.shards).glob("*/*.tar"))


def test_full_cache_evicts_least_recently_used_shards_and_keeps_pinned_ones(folder):
    size = max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    with serving(folder / "train") as server:
        cache = ShardCache(limit=3.5 * size)
        urls = [f"{server.url}/x-train-{i:06d}.tar" for i in range(8)]
        for url in (*urls[:3], urls[0], urls[3]):
            with open(cache.fetch(url), "rb") as file:
                assert file.read(1)
        assert cached(cache) == [f"x-train-00000{i}.tar" for i in (0, 2, 3)]
        pins = Pins(cache.shards)
        pins.set([cache.copy_path(urls[0]), cache.copy_path(urls[2])])
        for url in urls[4:]:
            cache.fetch(url)
        assert cached(cache) == [f"x-train-00000{i}.tar" for i in (0, 2, 7)]
        assert not list(Path(cache.shards).glob("*/*.part"))


def test_loader_keeps_the_cache_within_its_limit(folder):
    # A window of two shards is two batches, as many as a worker has under way: two windows are needed at a time.
    limit = 5.5 * max(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    with serving(folder) as server:
        data = module(f"{server.url}/train", window=2, workers=1, cache_gb=limit / 1e9)
        local, cache = module(folder / "train", window=2), data.train_index.cache
        for step in (0, 4, 8):
            assert batches_equal(data.train_loader(lambda step=step: step), local.train_loader(lambda step=step: step))
            assert sum(path.stat().st_size for path in Path(cache.shards).glob("*/*.tar")) <= limit
        assert sum(server.downloads().values()) < 24  # Some of the copies served a second epoch.


def test_evicted_copy_stays_readable_while_open(folder):
    index = open_shards(folder / "train")
    number, offset, size = index.locate(0)
    with serving(folder / "train") as server:
        url, cache = f"{server.url}/x-train-00000{number}.tar", ShardCache(limit=1)
        first = read(url, offset, size, cache)
        cache.fetch(f"{server.url}/x-train-000007.tar")
        assert not os.path.exists(cache.copy_path(url))
        assert read(url, offset, size, cache) == first


def test_cache_smaller_than_a_window_warns_and_gives_the_same_batches(folder, capfd):
    with serving(folder) as server:
        data = module(server.url, cache_gb=1e-4, workers=2)
        assert batches_equal(batches(data), batches(module(folder)))
        assert all(number <= 2 for number in server.downloads().values())
    warning = capfd.readouterr().err
    assert warning.count("data.cache_gb=0.0001 holds less than is read at a time: 3 shards take") == 1


def test_corrupt_download_is_repeated_and_raises_data_error_if_it_persists(folder):
    def fault(method: str, path: str, number: int) -> str | None:
        return "corrupt" if method == "GET" and path.endswith(".tar") and number == 1 else None

    with serving(folder / "train", fault=fault) as server:
        path = ShardCache(retry=QUICK).fetch(f"{server.url}/x-train-000000.tar")
        assert Path(path).read_bytes() == (folder / "train" / "x-train-000000.tar").read_bytes()
        assert server.downloads() == {"/x-train-000000.tar": 2}
        server.fault = lambda method, path, number: "corrupt" if path.endswith(".tar") else None
        with pytest.raises(DataError, match=r"after 6 attempts.*its checksum is 0*.*manifest\.json says"):
            ShardCache(retry=QUICK).fetch(f"{server.url}/x-train-000001.tar")


def test_shards_of_this_and_the_next_window_are_downloaded_ahead(folder):
    with serving(folder) as server:
        data = module(server.url)
        draws = iter(data.train_loader(lambda: 0).sampler)
        next(draws)
        wanted = {names([data.train_index.shards[i]])[0] for part in data.order.windows(0, 0) for i in part}
        assert len(wanted) == 6
        deadline = time.monotonic() + 120
        while set(cached(data.train_index.cache)) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(cached(data.train_index.cache)) == wanted


def test_windows_downloaded_ahead_follow_the_order(folder):
    order, index = module(folder).order, open_shards(folder / "train")
    for epoch, position in ((0, 0), (0, 23), (0, 24), (1, 47), (1, 48), (1, 63)):
        now, after = order.windows(epoch, position)
        sample = order.samples(epoch, position, position + 1)[0]
        assert index.locate(sample)[0] in now
        assert position >= 48 or not set(now) & set(after)
        following = (epoch, position // 24 * 24 + 24) if position < 48 else (epoch + 1, 0)
        assert after == order.windows(*following)[0]


# What is refused


def test_missing_remote_shard_raises_data_error_without_a_retry(folder, bucket):
    with serving(folder / "train") as server:
        for url in (f"{server.url}/nowhere.tar", f"{bucket}/nowhere.tar", "s3://no-such-bucket/x.tar"):
            with pytest.raises(DataError, match=r"nowhere\.tar does not exist|no-such-bucket") as error:
                open_shards(url)
            assert "\n" not in str(error.value)
        assert server.asked["HEAD", "/nowhere.tar"] == 1


def test_forbidden_remote_shard_raises_data_error_without_a_retry(folder):
    with serving(folder / "train", fault=lambda *request: "403") as server:
        with pytest.raises(DataError, match=r"may not be read .*403.*docs/data-remote\.md"):
            open_shards(f"{server.url}/x-train-000000.tar")
        assert server.asked["HEAD", "/x-train-000000.tar"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_dead_server_raises_data_error_after_its_retries(folder, tmp_path, workers):
    with serving(folder / "train") as server:
        cache = ShardCache(retry=Retry(attempts=3, first=0.01))
        data = module(f"{server.url}")
    data.train_index.cache = cache
    data.config = data.config.model_copy(update={"workers": workers})
    loader = data.train_loader(lambda: 0)
    with pytest.raises(DataError, match=r"cannot be read after 3 attempts in \d+ seconds") as error:
        list(loader)
    assert "\n" not in str(error.value)
    if loader._iterator is not None:  # Else the garbage collector would take its queues before its workers have ended.
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def test_prefetch_error_does_not_stop_the_other_downloads(folder):
    with serving(folder / "train") as server:
        prefetcher = Prefetcher(ShardCache(retry=QUICK))
        prefetcher.want([f"{server.url}/nowhere.tar", f"{server.url}/x-train-000003.tar"])
        deadline = time.monotonic() + 120
        while not cached(prefetcher.cache) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cached(prefetcher.cache) == ["x-train-000003.tar"]


# Streams without an index


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its processes to the garbage collector.
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_from_a_command_gives_batches_of_the_same_form(folder, workers, capfd):
    path = f"pipe:cat {folder}/train/x-train-{{000000..000007}}.tar"
    data = module(path, mode="stream", samples=64, val_path=str(folder / "val"), workers=workers)
    assert capfd.readouterr().err.count("a resumed run sees other images") == 1
    index = open_shards(folder / "train")
    labels = {index.key(sample): index.label(sample) for sample in range(64)}
    found = batches(data)
    assert len(found) == 8 and len(list(data.train_loader(lambda: 3, 0, 2))) == 1
    for batch, example in zip(found, batches(module(folder)), strict=True):
        assert batch.keys() == example.keys() and len(batch["keys"]) == 8
        for name in ("images", "labels", "positions", "samples"):
            assert (batch[name].dtype, batch[name].shape) == (example[name].dtype, example[name].shape)
        assert torch.equal(batch["positions"], example["positions"])
        assert batch["labels"].tolist() == [labels[key] for key in batch["keys"]]
    if workers == 0:
        assert len({key for batch in found for key in batch["keys"]}) == 64


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ranks_stream_their_own_shards_in_equally_many_batches(folder, bucket):
    with serving(folder, ranges=False) as server:
        for url in (f"pipe:cat {folder}", server.url, bucket):
            data = module(f"{url}/train/x-train-{{000000..000007}}.tar", mode="stream", samples=64)
            ranks = [[key for b in data.train_loader(lambda: 0, r, 2) for key in b["keys"]] for r in range(2)]
            assert len(ranks[0]) == len(ranks[1]) == 32 and not set(ranks[0]) & set(ranks[1])
            assert data.examples(3)[0].shape == (3, 3, 24, 24) and equal_pairs(data.examples(3), data.examples(3))
    few = module(f"pipe:cat {folder}/train/x-train-000000.tar", mode="stream", samples=64)
    assert sum(len(b["keys"]) for r in range(2) for b in few.train_loader(lambda: 0, r, 2)) == 64


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("command", ["cat /nowhere.tar", "head -c 40000 {}/train/x-train-000000.tar", "echo no tar"])
def test_failing_stream_command_raises_one_line_data_error(folder, command):
    data = module("pipe:" + command.format(folder), mode="stream", samples=16)
    with pytest.raises(DataError, match=r"^pipe:.* cannot be streamed: ") as error:
        batches(data)
    assert "\n" not in str(error.value)


def test_stream_without_samples_raises_an_error():
    for wrong in ({"mode": "stream"}, {"samples": 5}):
        with pytest.raises(ValidationError, match="mode=stream and samples go together"):
            DataConfig(path="pipe:cat x.tar", **wrong)
    with pytest.raises(DataError, match=r"data\.mode=stream"):
        open_shards("pipe:cat x.tar")


# Credentials in URLs.


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:p%40ss@h:80/a.tar", "http://hidden@h:80/a.tar"),
        ("https://token@h/a-{0..9}.tar?sig=1&b=&c", "https://hidden@h/a-{0..9}.tar?sig=hidden2&b=&hidden3"),
        ("pipe:curl 'https://u:p@h/x.tar?k=v' | cat", "pipe:curl 'https://hidden@h/x.tar?k=hidden2' | cat"),
        (
            "data.path=[http://u:p@h/a.tar,http://u:q@h/b.tar?x=1]",
            "data.path=[http://hidden@h/a.tar,http://hidden2@h/b.tar?x=hidden3]",
        ),
        ("http://u@h/a?k=1,2,http://u@h/b?l", "http://hidden@h/a?k=hidden2,http://hidden@h/b?hidden3"),
        ("s3://bucket/what?.tar", "s3://bucket/what?.tar"),
        ("hf://datasets/user/name@main/x.tar", "hf://datasets/user/name@main/x.tar"),
        ("/local/a?b=c@d.tar", "/local/a?b=c@d.tar"),
    ],
)
def test_hidden_credentials_are_put_back_for_their_host_alone(fresh_credentials: None, url: str, shown: str) -> None:
    assert hide(url) == shown and hide(shown) == shown
    assert reveal(shown) == url
    if shown != url:
        with pytest.raises(DataError, match="lacks the credential that is hidden in it"):
            reveal(shown.replace("@h", "@other"))


@pytest.mark.parametrize(
    ("url", "shown", "opened"),
    [
        ("http://user:pa/ss@h/a.tar", "http://hidden@h/a.tar", "http://user:pa%2Fss@h/a.tar"),
        ("http://user:/p#w@h.org/a@b/x.tar", "http://hidden@h.org/a@b/x.tar", "http://user:%2Fp%23w@h.org/a@b/x.tar"),
        ("ftp://user:p?w=1@h:21/a?b", "ftp://hidden@h:21/a?b", "ftp://user:p%3Fw=1@h:21/a?b"),
        ("http://user:p@s/w@h.org:80/a", "http://hidden@h.org:80/a", "http://user:p%40s%2Fw@h.org:80/a"),
        ("postgresql://user:p@ss/w@db:5432", "postgresql://hidden@db:5432", "postgresql://user:p%40ss%2Fw@db:5432"),
        ("s3://KEY:a/b+c@bucket/x@2.tar", "s3://hidden@bucket/x@2.tar", "s3://KEY:a%2Fb+c@bucket/x@2.tar"),
        (
            "http://u:p/q@h.org/a,http://v:r?s@h/b",
            "http://hidden@h.org/a,http://hidden@h/b",
            "http://u:p%2Fq@h.org/a,http://v:r%3Fs@h/b",
        ),
        ("zip://x.zip::http://user:pw@h/x", "zip://x.zip::http://hidden@h/x", "zip://x.zip::http://user:pw@h/x"),
    ],
)
def test_password_that_is_not_escaped_is_hidden_and_escaped_where_the_url_is_opened(
    fresh_credentials: None, url: str, shown: str, opened: str
) -> None:
    assert hide(url) == shown and hide(shown) == shown
    assert reveal(shown) == opened


@pytest.mark.parametrize(
    "url",
    [
        "http://h.org:8080/a@b/x.tar",
        "http://[::1]:8080/a@b.tar",
        "http://h/a@b.org/c:d@e/x.tar",
        "s3://bucket/a:b@c.org/x.tar",
        "s3://arn:aws:s3:us-east-1:123:accesspoint/name/x@2.tar",
        "file://C:/photos/a@b/x.tar",
        "sqlite:////data/a@b/mlflow.db",
        "http://h/a.tar,s3://bucket/b@c.tar",
        "http://h:port/a.tar, or write to somebody@h.org",
    ],
)
def test_at_in_a_path_is_no_credential(fresh_credentials: None, url: str) -> None:
    assert hide(url) == url


def test_programs_that_are_started_have_the_credentials(
    fresh_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = hide("http://user:pa55@h/a.tar?k=v")
    pass_on()
    for name in ("_secrets", "_names"):
        monkeypatch.setattr(credentials, name, defaultdict(dict))
    credentials._take_over()
    assert reveal(hidden) == "http://user:pa55@h/a.tar?k=v" and hide("http://user:pa55@h/") == "http://hidden@h/"


def signed(server: FileServer, path: str, name: str) -> str:
    return f"http://user:pa55word@127.0.0.1:{server.server_port}/{path}?X-Amz-Signature=s3cr3t{name}&part=1"


def assert_nowhere(folder: Path, *also: str) -> None:
    for file in folder.rglob("*"):
        assert not re.search("pa55word|s3cr3t", str(file)), file
        if file.is_file():
            assert not re.search(b"pa55word|s3cr3t", file.read_bytes()), file
    for text in also:
        assert not re.search("pa55word|s3cr3t", text), text


def test_credentials_of_a_url_stand_in_nothing_that_a_run_writes(
    tmp_path: Path, folder: Path, fresh_credentials: None, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """Not in its folder, report, TensorBoard, cache, nor in what is printed; eval.py asks for them again."""
    with serving(folder, credentials=("user:pa55word", "X-Amz-Signature=s3cr3t")) as server:
        paths = [signed(server, f"train/x-train-{number:06d}.tar", str(number)) for number in range(3)]
        quoted = ",".join(f"'{path}'" for path in paths)
        words = [
            "experiment=digits_tiny",
            f"data.path=[{quoted}]",
            f"data.val_path='{signed(server, 'val/x-val-000000.tar', 'v')}'",
        ]
        words += [f"runs={tmp_path}", "name=run", *SMALL, "max_steps=1", "global_batch=4", "data.workers=0"]
        words += ["logger=tensorboard", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        run_program(train.main)
        assert "X-Amz-Signature=hidden" in (tmp_path / "run" / "config.yaml").read_text()
        assert "hidden@127.0.0.1" in (tmp_path / "run" / "environment.json").read_text()
        write_report([tmp_path / "run"], tmp_path / "report.html")
        assert_nowhere(tmp_path, *capfd.readouterr())

        # A dead signature, and what eval.py finds in config.yaml.
        with pytest.raises(DataError, match=r"may not be read \(403") as refused:
            open_shards(signed(server, "train/x-train-000003.tar", "3").replace("s3cr3t", "dead-s3cr3t"))
        assert_nowhere(tmp_path, str(refused.value))
        for name in ("_secrets", "_names"):
            getattr(credentials, name).clear()
        with pytest.raises(DataError, match=r"Give the whole URL again, as data\.path="):
            open_shards(evaluation_data(tmp_path / "run", {}).path or "")
        assert len(open_shards(evaluation_data(tmp_path / "run", {"path": paths[0]}).path or "")) == 8


def test_credentials_of_a_url_stand_in_nothing_that_a_multirun_writes(
    tmp_path: Path, fresh_credentials: None, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    url = "http://user:pa55word@127.0.0.1:9/a.tar?X-Amz-Signature=s3cr3t"
    words = ["-m", "experiment=digits_tiny", f"data.path='{url}'", "name=grid", "optim.base_lr=-1,-2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit):
        run_program(train.main)
    assert "hidden@127.0.0.1" in (tmp_path / "sweeps" / "grid" / "multirun.yaml").read_text()
    assert_nowhere(tmp_path, *capfd.readouterr())


@pytest.mark.slow
def test_credentials_of_a_url_stand_in_nothing_that_trackers_write(tmp_path: Path, folder: Path) -> None:
    with serving(folder, credentials=("user:pa55word", "X-Amz-Signature=s3cr3t")) as server:
        words = [sys.executable, "train.py", "experiment=digits_tiny", *SMALL]
        words += [f"data.path='{signed(server, 'train/x-train-000000.tar', '0')}'"]
        words += [f"runs={tmp_path}", "name=run", "max_steps=2", "global_batch=4", "logger=[wandb,tensorboard,mlflow]"]
        words += ["val_every=null", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
        said = run(words, HOME=str(tmp_path), WANDB_API_KEY="", MAE_CACHE=str(tmp_path / "cache"))
    assert (
        list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")) and (tmp_path / "run" / "mlflow.db").exists()
    )
    assert_nowhere(tmp_path, said)
