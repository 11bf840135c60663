"""probe=embeddings writes the vectors of all images, in files that others read, and continues where it was stopped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mae
from data.datamodule import DataConfig, ShardDataModule
from mae.distributed.launch import Topology
from mae.errors import CheckpointError, ConfigError
from mae.models.pixels import Pixels
from mae.probes import embeddings
from mae.probes.features import describe
from tasks.evaluate import evaluate
from tests.test_eval import ALONE, pack_coloured, settings

parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install -e '.[embeddings]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with weights (encoder.pth), shards of 7 and 2 images, and the images of both."""
    folder = tmp_path_factory.mktemp("embeddings")
    pack_coloured(folder, {"train": [0, 1, 2, 0, 1, 2, 2], "val": [0, 1]})
    model = mae.Encoder(mae.MAEConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=4))
    torch.save({"model": model.state_dict()}, folder / "encoder.pth")
    return folder


def embed(place: Path, out: Path, *words: str, topology: Topology = ALONE) -> Path:
    shared = ("probe=embeddings", "probe.shard_images=3", "model.num_heads=4", f"out={out}")
    given = words if any(word.startswith("data.path=") for word in words) else (f"data.path={place}/shards", *words)
    evaluate(settings(place / "encoder.pth", *shared, *given), topology)
    return out / "embeddings"


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "card.json").read_text())


def read_npy(folder: Path, column: str) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"part-*.{column}.npy"))])


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, np.ndarray]:
    """Keys, labels and vectors of the training images by the model itself."""
    config = DataConfig(path=str(place / "shards"), workers=0)
    data = ShardDataModule(config, image_size=(32, 32), channels=3, seed=0, global_batch=1, micro_batch=1)
    index, samples = data.train_index, np.arange(7)
    model = mae.load(place / "encoder.pth", num_heads=4)
    images = Pixels(config.mean, config.std).normalise(data.crops(index, samples))
    with torch.inference_mode():
        latent = model.encode(images)
        first = model.blocks[0](model.embed(mae.models.patches.patchify(images, 8)))
    found = {name: describe(latent, 1, name).numpy() for name in ("patches", "class_token", "tokens")}
    found["patches.1"] = describe(first, True, "patches").numpy()
    return found | {"key": np.array([index.key(sample) for sample in samples]), "label": index.labels}


def test_parquet_and_npy_hold_the_keys_labels_and_vectors_of_all_images(
    place: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    words = "probe.vectors=[patches,class_token,tokens]", "data.workers=0"
    folder = embed(place, tmp_path, *words)
    table = parquet.read_table(folder / "train")
    arrays = embed(place, tmp_path / "npy", *words, "probe.format=npy") / "train"
    assert table.column_names == ["sample", "label", "key", "patches", "class_token", "tokens"]
    assert len(list((folder / "train").iterdir())) == 3 and parquet.read_table(folder / "val").num_rows == 2
    for name in ("key", "label", "patches", "class_token", "tokens"):
        column = table[name].combine_chunks()
        if expected[name].ndim > 1:
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False).reshape(expected[name].shape)
        for found in (values, read_npy(arrays, name)):
            if name in ("key", "label"):
                assert found.tolist() == expected[name].tolist()
            else:
                assert np.allclose(found, expected[name], rtol=0.05, atol=0.05)  # bf16 where the machine has it
    about = card(folder)
    assert (
        about["complete"] and about["classes"] == ["a", "b", "c"] and about["made_of"]["vectors"]["tokens"] == [16, 32]
    )
    assert about["parts"]["train"] == {"images": 7, "files": 3, "left_out": []}


def test_vectors_of_a_block_are_its_output_without_the_final_norm(
    place: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = embed(place, tmp_path, "probe.layers=[1,2]", "probe.format=npy", "data.workers=0")
    assert np.allclose(read_npy(folder / "train", "patches.1"), expected["patches.1"], rtol=0.05, atol=0.05)
    assert not np.allclose(read_npy(folder / "train", "patches.2"), expected["patches"], atol=0.05)
    with pytest.raises(ConfigError, match=r"probe\.layers has 3, and this encoder has 2 blocks"):
        embed(place, tmp_path / "other", "probe.layers=[3]")


def test_embeddings_continue_with_the_files_that_are_missing(place: Path, tmp_path: Path) -> None:
    folder = embed(place, tmp_path, "data.workers=0")
    lost = folder / "train" / "part-00001.parquet"
    before = lost.read_bytes()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("*/part-*") if file != lost}
    lost.unlink()
    (folder / "train" / "part-00001.parquet.0a1b2c3d.tmp").write_text("killed")
    embed(place, tmp_path, "data.workers=0")
    assert lost.read_bytes() == before
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/part-*") if file != lost} == kept
    with pytest.raises(ConfigError, match="holds embeddings of another kind: vectors"):
        embed(place, tmp_path, "probe.vectors=[class_token]")
    (folder / "card.json").unlink()
    with pytest.raises(ConfigError, match=r"holds files and no card\.json"):
        embed(place, tmp_path)


def test_ranks_write_their_files_and_the_first_waits_for_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero, one = (Topology(rank=rank, ranks=2, devices=1, nodes=1) for rank in (0, 1))
    with pytest.raises(CheckpointError, match="part-00001 was not written"):
        embed(place, tmp_path, "data.workers=0", topology=zero)
    folder = tmp_path / "embeddings"
    assert not card(folder)["complete"] and len(list((folder / "train").iterdir())) == 2
    monkeypatch.setenv("RANK", "1")
    embed(place, tmp_path, "data.workers=0", topology=one)
    monkeypatch.delenv("RANK")
    embed(place, tmp_path, "data.workers=0", topology=zero)
    assert card(folder)["complete"] and parquet.read_table(folder / "train")["sample"].to_pylist() == list(range(7))


def test_plain_folder_of_photographs_is_embedded_and_a_damaged_one_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tmp_path / "my photos"
    for number in range(4):
        (photographs / "d" / "e").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (60 * number, 0, 0)).save(photographs / "d" / "e" / f"IMG {number}.x.jpg")
    (photographs / "d" / "e" / "IMG 2.x.jpg").write_bytes(b"no picture")
    folder = embed(place, tmp_path / "out", f"data.path='{photographs}'", "data.workers=0")
    table = parquet.read_table(folder / "images")
    assert table["key"].to_pylist() == [f"d/e/IMG {number}.x.jpg" for number in (0, 1, 3)]
    assert card(folder)["parts"]["images"]["left_out"] == ["d/e/IMG 2.x.jpg"]
    assert "left out, because they cannot be read: 1 of 4 images of images: d/e/IMG 2.x.jpg" in capsys.readouterr().out


def test_without_pyarrow_files_are_npy_and_parquet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "find_spec", lambda name: None)
    wanted = embeddings.Embeddings(name="embeddings", vectors=["patches"])
    fmt, remark = wanted.choose_format()
    assert fmt == "npy" and "pyarrow is not installed (pip install -e '.[embeddings]')" in remark
    with pytest.raises(ConfigError, match=r"Or take probe\.format=npy"):
        wanted.model_copy(update={"format": "parquet"}).choose_format()
