"""Classes: one number means one name in every part, or the program says which, where, and what mends it."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datamodule import DataConfig, ShardDataModule
from data.errors import DataError
from data.evaluation import EvaluationImages
from data.index.classes import class_names, remarks_on_labels, same_name
from data.index.index import index_tars, open_shards
from data.index.splits import list_shards
from data.inspect.inspect import inspect
from data.pack.image_folder import find_images
from mae.distributed.launch import Topology
from mae.errors import ConfigError
from mae.models.classifier import Classifier
from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.models.pixels import Pixels
from mae.probes.classify import Classify
from mae.probes.feature_cache import FeatureCache
from mae.probes.features import Features
from mae.probes.knn import KNN, knn_accuracy
from mae.probes.models_under_probe import ModelsUnderProbe
from mae.probes.suite import Suite, select_probes
from tasks.finetune import Finetune, refuse_count, refuse_other_classes
from tasks.pretrain import Pretrain
from tests.processes import SMALL
from tests.test_experiments import compose
from tests.test_index import write_tar
from tests.test_pack import image, pack, refused

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)


def folder(root: Path, images: dict[str, int]) -> Path:
    """Returns a folder with so many images of each class; 0 for an empty sub-folder."""
    for number, (name, count) in enumerate(images.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image(root / name / f"{i}.png", 40 * number + i)
    return root


def packed(source: object, out: Path, *words: object) -> list[str]:
    """Packs and returns the names of the classes."""
    ended = pack(source, out, *words)
    assert ended.returncode == 0, ended.stderr
    return json.loads((out / "manifest.json").read_text())["classes"]


def names_by_key(out: Path) -> set[tuple[str, str]]:
    """Returns (sub-folder, name of the class) of all images."""
    index = open_shards(out)
    names = class_names(index.shards)
    return {(index.key(sample).split("/")[-2], names[index.label(sample)]) for sample in range(len(index))}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images of three classes, validation images of the first and the last, numbered on their own."""
    root = tmp_path_factory.mktemp("parts")
    tr, va = folder(root / "tr", {"cat": 22, "dog": 22, "horse": 22}), folder(root / "va", {"cat": 5, "horse": 5})
    assert packed(tr, root / "out" / "train") == ["cat", "dog", "horse"]
    assert packed(va, root / "out" / "val") == ["cat", "horse"]
    return root / "out"


def settings(data: object, *words: str):
    return compose(*SMALL, "data=shards", f"data.path={data}", "data.workers=0", *words)


def under_probe(data: ShardDataModule, folder: Path, **names: list[str]) -> ModelsUnderProbe:
    """Returns a small classifier of three classes, called so if told, beside its images."""
    model = Classifier(MAEConfig(image_size=16, patch_size=8, width=48, depth=1, num_heads=3), 3)
    model.class_names = names.get("names", [])
    return ModelsUnderProbe(
        {"trained": model},
        EvaluationImages(data, 8),
        Pixels(data.config.mean, data.config.std),
        FeatureCache(folder / "features", 1e9),
        pool="patches",
        seed=0,
        device=torch.device("cpu"),
    )


def opened(path: object, **fields: object) -> ShardDataModule:
    config = DataConfig.model_validate({"path": str(path), "workers": 0, **fields})
    return ShardDataModule(config, image_size=(16, 16), channels=3, seed=0, global_batch=1, micro_batch=1)


def test_parts_with_other_class_numbers_are_refused_wherever_labels_meet_and_the_command_mends_them(
    parts: Path, tmp_path: Path
) -> None:
    differ = r"label 1 is 'dog' in the one and 'horse' in the other\. .*val lacks dog\. Pack"
    with pytest.raises(DataError, match=differ) as refusal:
        assert Finetune(settings(parts, "task=finetune"), ALONE).classes
    probed = under_probe(opened(parts), tmp_path)
    for probe in (KNN(name="knn"), Classify(name="classify")):
        assert re.search(differ, probe.refusal(probed) or "")
    with pytest.raises(DataError, match=r"online_probe.every=2: .*label 1 is 'dog'.*Or set online_probe"):
        Pretrain(settings(parts, "online_probe.every=2"), ALONE).callbacks()
    assert Pretrain(settings(parts), ALONE).callbacks()  # no label is used
    assert re.search(differ, inspect(index_tars(list_shards(parts)))["classes_differ"])

    words = shlex.split(re.search("`python -m data.pack (.*?)`", str(refusal.value))[1])  # type: ignore[index]
    assert packed(words[0], Path(words[1]), *words[2:]) == ["cat", "dog", "horse"]
    assert names_by_key(Path(words[1])) == {("cat", "cat"), ("horse", "horse")}
    task = Finetune(settings(parts, f"data.val_path={words[1]}", "task=finetune"), ALONE)
    assert task.classes == 3 and task.class_names == ["cat", "dog", "horse"]
    assert KNN(name="knn").refusal(under_probe(opened(parts, val_path=words[1]), tmp_path)) is None


def test_classifier_is_evaluated_only_on_images_of_its_own_classes(parts: Path, tmp_path: Path) -> None:
    data = opened(parts / "val", val_path=str(parts / "val"))
    classify = Classify(name="classify")
    assert classify.refusal(under_probe(data, tmp_path, names=["cat", "horse", "owl"])) is None
    reason = classify.refusal(under_probe(data, tmp_path, names=["cat", "dog", "horse"])) or ""
    assert "label 1 is 'horse' in them and 'dog' in the classifier" in reason
    with pytest.warns(UserWarning, match="'tabby', … in the classifier, 'cat', … in the images: numbers"):
        assert classify.refusal(under_probe(data, tmp_path, names=["tabby", "hound", "pony"])) is None
    write_tar(tmp_path / "x.tar", {"a.png": image(tmp_path / "a.png").read_bytes(), "a.cls": b"7"})
    reason = classify.refusal(under_probe(opened(tmp_path / "x.tar", val_path=str(tmp_path / "x.tar")), tmp_path))
    assert "labels below 3" in (reason or "") and "go up to 7" in (reason or "")


def test_suite_over_parts_with_other_class_numbers_leaves_out_the_probes_that_need_labels(
    parts: Path, tmp_path: Path
) -> None:
    probed = under_probe(opened(parts), tmp_path)
    config = MAEConfig(image_size=16, patch_size=8, width=48, depth=1, num_heads=3, decoder_width=48, decoder_depth=1)
    probed.models["trained"] = MaskedAutoencoder(config)
    linear = {"strengths": [1.0], "lars": {}}
    suite = Suite.model_validate(
        {
            "name": "suite",
            "knn": {"name": "knn"},
            "linear": {"name": "linear", **linear},
            "attentive": {"name": "attentive", "lrs": [1e-3], "weight_decays": [0.0]},
            "reconstruct": {"name": "reconstruct", "ratios": [0.75]},
        }
    )
    probes, left_out = select_probes(suite, probed)
    assert [probe.name for probe in probes] == ["reconstruct"] and list(left_out) == ["knn", "linear", "attentive"]
    assert all("label 1 is 'dog'" in reason for reason in left_out.values())


def test_probe_of_training_images_of_one_class_is_refused(tmp_path: Path) -> None:
    data = image(tmp_path / "a.png").read_bytes()
    write_tar(
        tmp_path / "x.tar", {f"{i}.{end}": body for i in range(3) for end, body in (("png", data), ("cls", b"1"))}
    )
    probed = under_probe(opened(tmp_path / "x.tar", val_path=str(tmp_path / "x.tar")), tmp_path)
    assert "several classes, and all 3 have the label 1" in (KNN(name="knn").refusal(probed) or "")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ({"dog": 1, "cat": 0}, ["cat", "dog"]),
        ({"1": "dog", "0": "cat"}, ["cat", "dog"]),
        (2, []),
        ({"cat": 1, "dog": 2}, None),
        ([{"id": 0, "name": "cat"}], None),
        ("classes.txt", None),
    ],
)
def test_classes_of_a_foreign_manifest_are_names_or_refused(
    tmp_path: Path, classes: object, names: list[str] | None
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": classes}))
    if names is None:
        with pytest.raises(DataError, match=r"manifest\.json has `classes` in a form that is not known"):
            class_names([str(tmp_path / "x.tar")])
    else:
        assert class_names([str(tmp_path / "x.tar"), "pipe:cat y.tar"]) == names


def test_lists_agree_if_one_is_the_beginning_of_the_other(tmp_path: Path) -> None:
    packed(folder(tmp_path / "tr", {"cat": 1, "dog": 1, "horse": 1}), tmp_path / "out/train")
    packed(folder(tmp_path / "va", {"cat": 1, "dog": 1}), tmp_path / "out/val")
    assert opened(tmp_path / "out").class_names == ["cat", "dog", "horse"]
    packed(folder(tmp_path / "other", {"cow": 1, "dog": 1}), tmp_path / "farm")
    with pytest.raises(DataError, match=r"farm lacks cat, horse, and .*train lacks cow.*text file, one per line"):
        assert opened(tmp_path / "out", val_path=str(tmp_path / "farm")).class_names


def test_name_of_a_class_is_the_same_however_a_computer_writes_it(tmp_path: Path) -> None:
    for part, name in (("train", "ka\u0308se"), ("val", "k\u00e4se")):  # two characters, and one
        packed(folder(tmp_path / f"{part}.in", {name: 1, "zoo": 1}), tmp_path / "out" / part)
    assert opened(tmp_path / "out").class_names == ["k\u00e4se", "zoo"]
    packed(tmp_path / "train.in", tmp_path / "again", "--classes", tmp_path / "out" / "val")
    assert same_name("caf\udce9").encode()  # a byte that is no UTF-8
    (tmp_path / "train.in" / "k\u00e4se").mkdir()
    image(tmp_path / "train.in" / "k\u00e4se" / "a.png")
    refused(
        pack(tmp_path / "train.in", tmp_path / "no", "--classes", tmp_path / "out/val"), "2 classes that are called"
    )


def test_empty_class_folder_keeps_its_number(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"ant": 1, "bee": 0, "cat": 1, "notes": 0, "test": 0})
    (source / "notes" / "a.txt").write_text("no image")
    ended = pack(source, tmp_path / "out")
    assert ended.returncode == 0 and "1 of 3 classes have no image" in ended.stderr
    assert names_by_key(tmp_path / "out") == {("ant", "ant"), ("cat", "cat")}
    assert find_images(source).classes == ["ant", "bee", "cat"]


def test_classes_option_numbers_folders_lists_and_tars_alike(parts: Path, tmp_path: Path) -> None:
    names, train = ["cat", "dog", "horse"], parts / "train"
    assert packed(parts.parent / "va", tmp_path / "folder", "--classes", train) == names
    (parts.parent / "list.csv").write_text("path,label\nva/horse/0.png,horse\nva/cat/0.png,cat\n")
    (parts.parent / "numbers.csv").write_text("path,label\nva/horse/0.png,2\nva/cat/0.png,0\n")
    for name in ("list", "numbers"):
        assert packed(parts.parent / f"{name}.csv", tmp_path / name, "--classes", train) == names
    (tmp_path / "names.txt").write_text("horse\ncat\n\ndog\n")
    refused(pack(train, tmp_path / "no", "--classes", tmp_path / "names.txt"), "names.txt has an empty line")
    (tmp_path / "names.txt").write_text("horse\ncat\ndog\n")
    assert packed(train, tmp_path / "tars", "--classes", tmp_path / "names.txt") == ["horse", "cat", "dog"]
    for out in ("folder", "list", "numbers", "tars"):
        assert all(key == name for key, name in names_by_key(tmp_path / out)), out
    refused(
        pack(parts.parent / "tr", tmp_path / "no", "--classes", parts / "val"), "has the classes dog, which --classes"
    )
    refused(pack(train, tmp_path / "no", "--classes", parts / "val"), "has the classes dog, which --classes")
    refused(pack(parts.parent / "va" / "cat", tmp_path / "no", "--classes", train), "has no sub-folder or .cls file")
    refused(pack(parts.parent / "va", tmp_path / "no", "--classes", parts), "names no classes")
    assert packed(parts.parent / "va", tmp_path / "manifest", "--classes", train / "manifest.json") == names
    write_tar(tmp_path / "in.tar", {"a.png": image(tmp_path / "a.png").read_bytes(), "a.cls": b"3"})
    refused(pack(tmp_path / "in.tar", tmp_path / "no", "--classes", train), "has the label 3, and --classes ends at 2")


def test_parts_of_a_pack_and_their_merge_have_one_list_of_classes(parts: Path, tmp_path: Path) -> None:
    words = (parts.parent / "va", tmp_path / "two", "--shard-size", 5)
    assert pack(*words, "--part", "1/2").returncode == 0
    given = ("--classes", parts / "train")
    refused(
        pack(*words, "--part", "2/2", *given), "the 2 classes cat, horse, where now they are the 3 classes cat, dog"
    )
    assert pack(*words, "--part", "2/2").returncode == 0
    refused(pack(*words, "--merge", *given), "the 2 classes cat, horse, where now they are")
    assert packed(*words[:2], *words[2:], "--merge") == ["cat", "horse"]


def test_tars_of_two_folders_with_other_class_numbers_are_not_packed_together(parts: Path, tmp_path: Path) -> None:
    refused(pack(f"{parts}/{{train,val}}/*.tar", tmp_path / "no"), "mixes the splits")
    packed(parts / "val", tmp_path / "more")
    packed(parts / "train", tmp_path / "most")
    refused(pack(f"{tmp_path}/mo{{re,st}}/*.tar", tmp_path / "no"), "number their classes differently")


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        ("10.0 2.0 0.0", [10, 2, 0], 11),
        ("10 2 -1", [10, 2, -1], 11),
        ("1.0 -1.0 0", [1, -1, 0], 2),
        ("1355936 99 1355936.0", [0, 1, 0], 2),  # ids
        ("dog -1 cat", [1, -1, 0], 2),
        ("1.000000000000000000e+01 2e0 0", [10, 2, 0], 11),  # as numpy.savetxt does
        ("-1 -1 -1", [-1, -1, -1], 0),
    ],
)
def test_csv_labels_as_pandas_writes_them_are_numbers(tmp_path: Path, labels: str, numbers: list, classes: int) -> None:
    lines = [f"{image(tmp_path / f'{i}.png', i).name},{label}\n" for i, label in enumerate(labels.split())]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
    ended = pack(tmp_path / "list.csv", tmp_path / "out")
    index = open_shards(tmp_path / "out")
    assert [index.label(i) for i in np.argsort([index.key(i) for i in range(3)])] == numbers
    assert len(json.loads((tmp_path / "out/manifest.json").read_text())["classes"]) == classes
    if classes and -1 in numbers:
        assert "1 images with the label -1 are packed without a label" in ended.stderr


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("1 cat", "numbers and names for labels: '1' in line 2, 'cat' in line 3"),
        ("cat 7.0", "numbers and names for labels: '7' in line 3, 'cat' in line 2"),
        ("1 -2", "line 3 has the label -2, which is no class"),
        ("1.5 2", "line 2 has the label 1.5, which is no class"),
        ("cat nan", "line 3 has the label nan, which is no class"),
        ("cat NaN", "line 3 has the label NaN, which is no class"),
        ("0 <NA>", "line 3 has the label <NA>, which is no class"),
    ],
)
def test_csv_label_that_is_no_class_ends_with_an_error(tmp_path: Path, labels: str, says: str) -> None:
    lines = [f"{i}.png,{label}\n" for i, label in enumerate(labels.split())]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
    refused(pack(tmp_path / "list.csv", tmp_path / "out"), says)


def test_labels_that_no_list_names_are_remarked_upon(tmp_path: Path) -> None:
    data = image(tmp_path / "a.png").read_bytes()

    def remarks(train: list[int], val: list[int]) -> str:
        place = tmp_path / f"{train} {val}"
        place.mkdir()
        for part, labels in (("train", train), ("val", val)):
            files = {
                f"{i}.{end}": body for i, k in enumerate(labels) for end, body in (("png", data), ("cls", b"%d" % k))
            }
            write_tar(place / f"{part}.tar", files)
        return "; ".join(remarks_on_labels(*(open_shards(place / f"{part}.tar") for part in ("train", "val"))))

    assert not remarks([0, 1, 2], [0, 1, 2])
    assert "labels 0 … 1 and the training images 0 … 2, and no manifest.json" in remarks([0, 1, 2], [0, 1])
    assert not remarks([0, 1, 2], [0, 2])
    assert "1 of 2 validation images are of classes without a training image, and count as wrong: 5" in remarks(
        [0, 1], [0, 5]
    )
    assert "no training image is of 1 of the 3 classes: 0" in remarks([1, 2], [1, 2])
    assert remarks_on_labels(open_shards(tmp_path / "[1, 2] [1, 2]", "train")) == [
        "no training image is of 1 of the 3 classes: 0"
    ]


def test_fine_tuning_on_one_class_or_on_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs several classes, and all images are of one"):
        refuse_count(np.array([0, 0]), 1, ["cat"])
    ids, said = (
        np.array([13559, 7, 13559]),
        r"up to 13,559, and 2 different ones occur: .* or set task.classes=13560 if",
    )
    for names in ([], [str(label) for label in range(13560)]):  # as a list of numbers is packed
        with pytest.raises(ConfigError, match=said):
            refuse_count(ids, 13560, names)
    refuse_count(ids, 13560, [f"species {label}" for label in range(13560)])
    refuse_count(np.arange(13560), 13560, [])


def test_features_kept_under_other_labels_are_not_used(tmp_path: Path) -> None:
    """A pack with other numbers may have the same headers, and with them the same fingerprint."""
    source, identities = folder(tmp_path / "in", {"cat": 2, "dog": 2}), []
    for names in ("cat\ndog\n", "dog\ncat\n"):
        (tmp_path / "names.txt").write_text(names)
        packed(source, tmp_path / "out", "--classes", tmp_path / "names.txt", "--overwrite")
        identities.append(EvaluationImages(opened(tmp_path / "out"), 1).identity("train"))
    one, other = identities
    assert one["fingerprint"] == other["fingerprint"] and one["labels"] != other["labels"]


def test_run_resumes_only_on_images_of_the_same_classes(tmp_path: Path) -> None:
    refuse_other_classes([], ["cat"], tmp_path)  # of versions that kept no names
    refuse_other_classes(["cat", "dog"], ["cat", "dog"], tmp_path)
    with pytest.raises(ConfigError, match="label 1 was 'dog' there and is 'horse'"):
        refuse_other_classes(["cat", "dog"], ["cat", "horse"], tmp_path)


def test_labels_that_are_ids_take_no_more_room_than_others() -> None:
    values, ids = torch.eye(4), torch.tensor([2**40, 7, 2**50, 2**40])
    assert knn_accuracy(Features(torch.arange(4), ids, values), Features(torch.arange(4), ids, values), k=1) == 1
