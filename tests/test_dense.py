"""probe=dense: exact counts, windows and heads against other implementations, and whole evaluations of photographs."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from omegaconf import OmegaConf
from PIL import Image
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.models.config import MAEConfig
from mae.models.mae import MaskedAutoencoder
from mae.models.resample import at_image_size
from mae.models.vit import Encoder
from mae.probes.dense_heads import LinearHead, NeighbourHead, Table, Windows, fit_depths, fit_on_pixels, fit_on_tokens
from mae.probes.dense_scores import count_pixels, depth_errors, segmentation_scores
from mae.probes.dense_targets import Classes, class_shares, find_classes, log_depths
from mae.probes.dense_tokens import drawn_rows, encode_windows, position_and_colour, thin
from mae.probes.windows import crop_windows, cut_windows, merge_windows, resize_nearest, shown_size
from mae.report.evaluations import read_evaluations
from mae.report.show_summary import main as show_summary
from mae.run.metrics import read_metrics
from tasks.evaluate import evaluate
from tasks.train import train
from tests.processes import assert_same_run, run
from tests.test_eval import ALONE, settings
from tests.test_experiments import REDUCED, compose
from tests.test_index import write_tar

CPU = torch.device("cpu")
TINY = ("model.width=16", "model.depth=2", "model.num_heads=2", "model.patch_size=8", "model.image_size=64")
FEW = ("probe=dense", "probe.tokens=60", "probe.bank=300", "probe.steps=200", "probe.batch=256", "probe.shown=2")


def image(values: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def scene(number: int, size: tuple[int, int] = (64, 96)) -> tuple[np.ndarray, np.ndarray]:
    """A photograph of stripes and dots beside each other, and which is where; 255 at its border."""
    height, width = size
    random = np.random.default_rng(number)
    edge = 32 + 8 * (number % 4)
    rows, columns = np.mgrid[:height, :width]
    photograph = np.where(columns < edge, 255 * (rows // 2 % 2), 255 * ((rows // 4 + columns // 4) % 2))
    photograph = np.stack([photograph] * 3, -1) // 2 + random.integers(0, 60, (height, width, 3))
    truth = (columns >= edge).astype(np.uint8)
    truth[0] = 255
    return photograph.astype(np.uint8), truth


def scenes(folder: Path, part: str, count: int, **beside: bytes) -> Path:
    files = {}
    for number in range(count):
        photograph, truth = scene(number)
        files |= {f"{part}{number}.jpg": image(photograph, "JPEG"), f"{part}{number}.png": image(truth)}
        depth = np.where(truth == 255, 0, 1000 * (1 + 3 * truth.astype(np.uint16))).astype(np.uint16)
        files[f"{part}{number}.depth.png"] = image(depth)
    return write_tar(folder / f"{part}-000000.tar", files | beside)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a narrow model on photographs with maps, which nothing takes for images."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes(folder, "train", 8)
    scenes(folder, "val", 4)
    maps = ("data.label_maps=png", "data.depth_maps=depth.png")
    data = ("data=shards", f"data.path={folder}", "data.workers=0", "data.mean=[0.4,0.4,0.4]", "data.std=[0.2,0.2,0.2]")
    run_settings = ("name=run", "max_steps=2", "global_batch=4", "micro_batch=4")
    config = compose(f"runs={tmp_path_factory.mktemp('runs')}", *REDUCED, *data, *maps, *TINY, *run_settings)
    train(config, ALONE)
    return config.run


def test_windows_cover_the_photograph_with_a_stride_of_two_thirds() -> None:
    assert cut_windows((352, 480), None) == [(0, 0)]
    assert cut_windows((64, 64), (64, 64)) == [(0, 0)]
    # 90 * 2 / 3 = 60; the last window ends at the border.
    assert cut_windows((90, 200), (90, 90)) == [(0, 0), (0, 60), (0, 110)]


def test_averaged_windows_equal_torch_fold() -> None:
    window, size = (12, 12), (28, 20)  # a stride of 8 divides both
    places = cut_windows(size, window)
    values = torch.rand(len(places), 3, *window)
    columns = rearrange(values, "w c h v -> 1 (c h v) w")
    total = F.fold(columns, size, window, stride=8)
    count = F.fold(torch.ones_like(columns), size, window, stride=8)
    assert torch.allclose(merge_windows(values, places, size), (total / count)[0])
    pixels = torch.rand(3, *size)
    assert torch.allclose(merge_windows(crop_windows(pixels, places, window), places, size), pixels)


def test_photographs_are_shown_at_the_size_that_was_asked_for() -> None:
    assert shown_size((360, 480), (352, 480), 8, None) == (352, 480)
    assert shown_size((360, 480), None, 16, None) == (352, 480)  # 360 is 22.5 patches, rounded to an even number
    assert shown_size((300, 400), 150, 10, None) == (150, 200)
    assert shown_size((100, 400), None, 8, (128, 128)) == (128, 512)  # enlarged until a window fits


def test_shares_of_classes_in_patches_equal_average_pooling() -> None:
    truth = torch.randint(0, 4, (16, 24))
    truth[truth == 3] = 255
    found = class_shares(truth, [(0, 0)], (16, 24), 8, Classes(3, [], 255))
    pooled = F.avg_pool2d(torch.stack([(truth == number).float() for number in range(3)])[None], 8)
    assert torch.allclose(found, rearrange(pooled, "1 c h w -> (h w) c"))


def test_depths_of_patches_are_means_of_the_logs_of_known_pixels() -> None:
    truth = torch.zeros(8, 16)
    truth[:4, :8] = 2.0
    truth[:2, 8:] = 8.0
    truth[2:4, 8:] = 2.0
    found, known = log_depths(truth, [(0, 0)], (8, 16), 8)
    assert found.exp().flatten().tolist() == pytest.approx([2.0, 4.0]) and known.tolist() == [0.5, 0.5]


def test_counts_and_iou_equal_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 5, (40, 50)), random.integers(0, 4, (40, 50))
    truth[:10] = 255
    classes = Classes(6, [], 255)  # class 5 is nowhere
    counts = count_pixels(truth, predicted, classes)
    known = truth != 255
    assert counts.dtype == np.int64 and counts.sum() == known.sum()
    assert np.array_equal(counts, confusion_matrix(truth[known], predicted[known], labels=range(6)))
    scores = segmentation_scores(counts, classes)
    each = jaccard_score(truth[known], predicted[known], labels=range(5), average=None)
    assert scores["iou"] == pytest.approx([*each.tolist(), None])
    assert scores["miou"] == pytest.approx(each.mean())  # without the class that is nowhere
    assert scores["accuracy"] == pytest.approx((truth == predicted)[known].mean())


def test_void_inside_the_range_of_the_classes_is_neither_counted_nor_scored() -> None:
    truth, predicted = np.array([[0, 1, 2, 2]]), np.array([[1, 1, 2, 1]])
    scores = segmentation_scores(count_pixels(truth, predicted, Classes(3, [], 0)), Classes(3, [], 0))
    assert scores["iou"] == [0.5, 0.5] and scores["accuracy"] == pytest.approx(2 / 3)


def test_depth_errors_are_those_of_eigen() -> None:
    truth, predicted = np.array([[1.0, 2.0, 0.0, 4.0]]), np.array([[1.2, 1.0, 9.0, 4.0]])
    found = depth_errors(truth, predicted)
    assert found == pytest.approx((2 / 3, (0.2 + 0.5) / 3, np.sqrt((0.04 + 1) / 3)))
    assert depth_errors(np.zeros((2, 2)), np.ones((2, 2))) is None


@pytest.mark.parametrize("cosine", [True, False])
def test_neighbours_equal_those_of_a_search_one_by_one(cosine: bool) -> None:
    torch.manual_seed(0)
    bank, tokens, targets = torch.randn(50, 6) + 1, torch.randn(9, 6) + 1, torch.rand(50, 3)
    found = NeighbourHead(bank, targets, 5, cosine)(tokens)
    for token, said in zip(tokens, found, strict=True):
        if cosine:
            closeness = [float(F.cosine_similarity(token, other, dim=0)) for other in bank]
        else:
            closeness = [-float(((token - other) / bank.std(0)).norm()) for other in bank]
        nearest = sorted(range(50), key=lambda row: -closeness[row])[:5]
        assert torch.allclose(said, targets[nearest].mean(0), atol=1e-6)


def test_tokens_are_those_of_the_encoder_with_its_mean_class_token_first() -> None:
    config = MAEConfig(image_size=64, patch_size=8, width=16, depth=3, num_heads=2, class_tokens=2, mask_cell=4)
    model = MaskedAutoencoder(
        config.model_copy(update={"decoder_width": 16, "decoder_num_heads": 2, "decoder_depth": 1})
    ).eval()
    encoder = at_image_size(model, (24, 40))  # a grid of 3 x 5, which cells of 4 do not divide
    pixels = torch.randn(2, 3, 24, 40)
    with torch.inference_mode():
        latent, found = encoder.encode(pixels), encode_windows(encoder, pixels, (-1, 1))
        first = encoder.norm(encoder.blocks[0](encoder.embed(encoder.patchify(pixels))))
    assert found.shape == (2, 16, 32) and found.dtype == torch.float16
    assert torch.allclose(found[:, 1:, :16].float(), latent[:, 2:], atol=2e-3)
    assert torch.allclose(found[:, 0, :16].float(), latent[:, :2].mean(1), atol=2e-3)
    assert torch.allclose(found[:, 1:, 16:].float(), first[:, 2:], atol=2e-3)


def test_encoder_without_class_tokens_has_an_empty_first_row() -> None:
    encoder = Encoder(MAEConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, class_tokens=0))
    with torch.inference_mode():
        found = encode_windows(encoder, torch.randn(1, 3, 16, 16), (-1,))
    assert found.shape == (1, 5, 16) and not found[:, 0].any() and found[:, 1:].any()


def test_floor_knows_place_and_mean_colour_alone() -> None:
    pixels = torch.zeros(2, 3, 8, 16)
    pixels[1, 0, :, 8:] = 1.0
    found = position_and_colour(pixels, [(0, 0), (8, 16)], (16, 32), 8).float()
    assert found[0, 1:, :2].tolist() == [[0.25, 0.125], [0.25, 0.375]]
    assert found[1, 1:].tolist() == [[0.75, 0.625, 0, 0, 0], [0.75, 0.875, 1, 0, 0]]


def test_drawn_tokens_follow_from_seed_and_sample_and_carry_their_class_token() -> None:
    chosen = drawn_rows(3, 7, 100, 10)
    assert torch.equal(chosen, drawn_rows(3, 7, 100, 10)) and not torch.equal(chosen, drawn_rows(3, 8, 100, 10))
    assert len(chosen.unique()) == 10 and torch.equal(drawn_rows(0, 0, 5, 10), torch.arange(5))
    rows = torch.arange(2 * 3 * 1.0).view(2, 3, 1)  # two windows: class token, two patches
    assert thin(rows, torch.tensor([0, 3])).tolist() == [[1, 0], [5, 3]]


def test_linear_head_on_tokens_agrees_with_logistic_regression() -> None:
    torch.manual_seed(0)
    centres, labels = torch.randn(4, 8) * 0.5, torch.randint(0, 4, (1200,))
    values = (centres[labels] + torch.randn(1200, 8)).half()
    table = Table(values, F.one_hot(labels, 4).float(), torch.ones(1200))
    head = fit_on_tokens(table, lr=1e-2, weight_decay=0.0, batch=256, steps=600, seed=0, device=CPU)
    oracle = LogisticRegression(C=1e4).fit(values.float().numpy(), labels.numpy())
    with torch.no_grad():
        probabilities = head(values).softmax(-1).numpy()
    assert np.abs(probabilities - oracle.predict_proba(values.float().numpy())).mean() < 0.02


def test_depths_are_fitted_as_by_weighted_least_squares() -> None:
    torch.manual_seed(0)
    values, weights = torch.randn(300, 5), torch.rand(300).round(decimals=1)
    targets = values @ torch.randn(5, 1) + 2 + torch.randn(300, 1)
    found = fit_depths(Table(values, targets, weights))
    oracle = LinearRegression().fit(values.numpy(), targets.numpy(), sample_weight=weights.numpy())
    with torch.no_grad():
        assert np.allclose(found(values).numpy(), oracle.predict(values.numpy()), atol=2e-3)


def test_void_tokens_are_never_trained_on() -> None:
    values = torch.randn(100, 2).half()
    targets = F.one_hot((values[:, 0] > 0).long(), 2).float()
    weights = torch.ones(100)
    values[50:], targets[50:], weights[50:] = torch.nan, 0.0, 0.0
    head = fit_on_tokens(
        Table(values, targets, weights), lr=1e-2, weight_decay=0.0, batch=32, steps=50, seed=0, device=CPU
    )
    assert all(parameter.isfinite().all() for parameter in head.state_dict().values())


def test_pixel_loss_of_pixio_ignores_void_and_learns_the_classes() -> None:
    torch.manual_seed(0)
    grid = (4, 6)
    labels = torch.randint(0, 2, (20, *grid))
    tokens = torch.cat([torch.zeros(20, 1, 4), torch.randn(20, 24, 4)], 1)
    tokens[:, 1:, 0] += 6.0 * rearrange(labels, "w r c -> w (r c)")
    truth = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    truth[:, 0] = 9
    head = fit_on_pixels(
        Windows(tokens.half(), truth, grid),
        2,
        9,
        lr=1e-2,
        weight_decay=0.01,
        batch=8,
        epochs=40,
        pooled=True,
        seed=0,
        device=CPU,
    )
    assert isinstance(head, LinearHead)
    with torch.no_grad():
        said = head(tokens[:, 1:].flatten(0, 1), tokens[:, :1].expand(-1, 24, -1).flatten(0, 1)).argmax(1)
    assert (said == labels.flatten()).double().mean() > 0.95


def test_classes_beyond_the_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hold the value 3, and manifest.json names 2 classes, 0 … 1, and 255"):
        find_classes([torch.tensor([[0, 1, 3]])], ["sky", "road"], 255)
    with pytest.raises(ConfigError, match=r"several classes, and the label maps hold \[1\] beside void=0"):
        find_classes([torch.tensor([[0, 1]])], [], 0)
    assert find_classes([torch.tensor([[0, 2, 255]])], [], 255).count == 3


def test_nearest_resize_keeps_the_values() -> None:
    truth = torch.tensor([[0, 7], [255, 3]], dtype=torch.uint8)
    assert torch.equal(resize_nearest(truth, (4, 6)), truth.repeat_interleave(2, 0).repeat_interleave(3, 1))
    assert torch.equal(resize_nearest(truth, (2, 2)), truth)


def test_dense_evaluation_scores_counts_and_draws(
    dense_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stripes and dots of one colour: their patches tell them apart, their mean colour does not."""
    evaluate(settings(dense_run, *FEW), ALONE)
    folder = dense_run / "eval"
    found = json.loads((folder / "dense.json").read_text())
    assert found["train_images"] == 8 and found["test_images"] == 4 and found["classes"] == ["0", "1"]
    assert found["untrained"]["miou"]["linear"] > found["floors"]["miou"]["linear"]["position and colour"]
    for head in ("linear", "knn"):
        assert 0.5 < found["trained"]["miou"][head] <= 1
        with open(folder / "dense" / f"confusion-{head}-trained.csv") as file:
            _, *rows = csv.reader(file)
        counts = np.array([[int(value) for value in row[1:]] for row in rows])
        truths = [scene(number)[1] for number in range(4)]
        assert counts.sum(1).tolist() == [sum(int((truth == label).sum()) for truth in truths) for label in (0, 1)]
        iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
        assert found["trained"]["miou"][head] == pytest.approx(iou.mean())
    with Image.open(folder / "dense.png") as picture:
        assert picture.width > 300
    (evaluation,), _ = read_evaluations(folder)
    measured, trained, untrained, floors = evaluation.scores[0]
    assert measured == "dense, mean IoU, linear" and "position and colour" in floors and trained and untrained
    monkeypatch.setattr(sys, "argv", ["summary", str(dense_run)])
    assert show_summary() == 0
    assert f"{found['trained']['miou']['knn']:.1%} trained" in capsys.readouterr().out


def test_dense_evaluation_of_windows_at_another_size_with_the_published_protocol(
    dense_run: Path, tmp_path: Path
) -> None:
    published = ("probe.protocol=pixio", "probe.window=48", "probe.size=48", "probe.layers=[1,-1]")
    evaluate(settings(dense_run, *FEW, *published, "probe.untrained=false", f"out={tmp_path}"), ALONE)
    found = json.loads((tmp_path / "dense.json").read_text())
    assert "trained 60 steps on 16 windows" in found["remarks"][0]
    assert "untrained" not in found and 0.3 < found["trained"]["miou"]["linear"] <= 1


def test_dense_evaluation_of_depths(dense_run: Path, tmp_path: Path) -> None:
    evaluate(settings(dense_run, *FEW, "probe.target=depth", f"out={tmp_path}"), ALONE)
    found = json.loads((tmp_path / "dense.json").read_text())
    for head in ("linear", "knn"):
        assert found["trained"]["delta1"][head] > 0.5 and found["trained"]["abs_rel"][head] < 0.6
    assert set(found["floors"]) == {"delta1", "abs_rel"}


def test_kept_tokens_give_the_same_scores(dense_run: Path, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        evaluate(settings(dense_run, *FEW, "probe.test_images=2", f"out={tmp_path}"), ALONE)
        results.append(json.loads((tmp_path / "dense.json").read_text()))
        kept = sorted((tmp_path / "features").iterdir())
    assert len(kept) == 4 and results[0] == results[1]  # two models, two splits


def test_two_ranks_count_the_same_pixels_as_one(dense_run: Path, tmp_path: Path) -> None:
    words = ["eval.py", f"checkpoint={dense_run}", "data.workers=0", *FEW, "probe.test_images=3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*launcher, *words, f"out={tmp_path / 'two'}"])
    evaluate(settings(dense_run, *FEW, "probe.test_images=3", f"out={tmp_path / 'one'}"), ALONE)
    for file in (tmp_path / "one" / "dense").iterdir():
        assert file.read_text() == (tmp_path / "two" / "dense" / file.name).read_text()


def test_photographs_without_a_map_that_fits_are_left_out_and_named(dense_run: Path, tmp_path: Path) -> None:
    photograph, truth = scene(9)
    odd = {
        "x.jpg": image(photograph, "JPEG"),
        "y.jpg": image(photograph, "JPEG"),
        "y.png": image(truth[:32]),
        "z.jpg": image(photograph, "JPEG"),
        "z.png": image(photograph),
    }
    shard = scenes(tmp_path / "test", "test", 2, **odd)
    evaluate(settings(dense_run, *FEW, f"data.val_path={shard}", f"out={tmp_path / 'out'}"), ALONE)
    found = json.loads((tmp_path / "out" / "dense.json").read_text())
    assert found["left_out"] == {"train": [], "test": ["x", "y", "z"]} and found["test_images"] == 2
    assert "3 of 5 photographs of test" in found["remarks"][0] and "it has no x.png beside it" in found["remarks"][0]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("data.label_maps=seg.png", "data.image=jpg"),
            r"none of the 8 photographs of train; the first is train0: it has no",
        ),
        (("probe.layers=[0]",), r"layers=\[0\] has 0, and this encoder has 2 blocks"),
        (("probe.window=50",), r"window=\[50, 50\] has 50, which patches of 8 pixels do not divide"),
        (("probe.protocol=pixio", "probe.target=depth"), "protocol=pixio is of segmentation"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    dense_run: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        evaluate(settings(dense_run, *FEW, *words, f"out={tmp_path}"), ALONE)


def test_camvid_is_measured_with_the_names_of_its_manifest(dense_run: Path, real_images: Path, tmp_path: Path) -> None:
    camvid = real_images / "camvid"
    if not camvid.is_dir():
        pytest.skip("no real images: camvid")
    data = (f"data.path={camvid}", f"data.val_path={camvid}/camvid-test-000000.tar", "data.label_maps=png")
    few = ("probe.train_images=6", "probe.test_images=3", "probe.size=[88,120]", "probe.untrained=false")
    evaluate(settings(dense_run, *FEW, *few, *data, f"out={tmp_path}"), ALONE)
    found = json.loads((tmp_path / "dense.json").read_text())
    assert found["classes"][:2] == ["sky", "building"] and found["void"] == 11
    assert found["trained"]["iou"]["linear"]["road"] > 0.3


def test_online_segmentation_equals_that_of_the_checkpoint_and_changes_nothing(dense_run: Path, tmp_path: Path) -> None:
    stored = OmegaConf.load(dense_run / "config.yaml")
    maps = ("data.label_maps=png", "data.depth_maps=depth.png", "data.workers=0")
    data = ("data=shards", f"data.path={stored.data.path}", "data.mean=[0.4,0.4,0.4]", "data.std=[0.2,0.2,0.2]", *maps)
    short = ("max_steps=2", "global_batch=4", "micro_batch=4")
    probe = ("online_probe.every=1", "online_probe.dense_images=8", "task.ema=0.5")
    runs = {}
    for name, more in {"with": probe, "without": ("task.ema=0.5",)}.items():
        config = compose(f"runs={tmp_path}", f"name={name}", *REDUCED, *data, *TINY, *short, *more)
        train(config, ALONE)
        runs[name] = config.run
    assert_same_run(runs["with"], runs["without"])
    rows = [row for row in read_metrics(runs["with"] / "metrics.csv") if "dense/miou" in row]
    assert len(rows) == 2 and all(0 < float(row["dense_average/miou"]) <= 1 for row in rows)
    same = ("probe=dense", "probe.heads=[knn]", "probe.size=64", "probe.window=64", "probe.tokens=100", "weights=raw")
    evaluate(settings(runs["with"], *same, f"out={tmp_path / 'out'}"), ALONE)
    found = json.loads((tmp_path / "out" / "dense.json").read_text())
    assert float(rows[-1]["dense/miou"]) == pytest.approx(found["trained"]["miou"]["knn"], abs=1e-3)


def test_online_segmentation_without_maps_or_steps_is_refused(tmp_path: Path, built_in: Path) -> None:
    with pytest.raises(ValueError, match=r"dense_images=8 are measured every online_probe\.every steps"):
        compose(f"runs={tmp_path}", "online_probe.dense_images=8")
    probe = ("online_probe.every=1", "online_probe.dense_images=8", f"data.root={built_in}", "max_steps=2")
    with pytest.raises(ConfigError, match=r"online_probe.dense_images=8: no maps of classes are named: set data"):
        train(compose(f"runs={tmp_path}", "name=no_maps", *REDUCED, *probe), ALONE)
