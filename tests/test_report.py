"""python -m mae.report: what a run was, on one page that needs nothing else."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.layers.attention import Attention

import mae
from mae.distributed.launch import Topology
from mae.models.attention_maps import attention_weights, rollout
from mae.models.mae import Reconstruction
from mae.pictures.draw import add_caption, reconstruction_columns, save_grid, shown_range, stretch, tiles
from mae.pictures.show import read_grid
from mae.report.__main__ import main
from mae.report.axes import BUCKETS, LARGEST, axis, thin
from mae.report.loss_curve import draw_loss_curve
from mae.report.run_pictures import picture_url
from mae.report.show_summary import main as summary_main
from mae.report.summary import summarise
from mae.run.metrics import MetricsCSV, read_metrics
from mae.train.schedule import Schedule
from tasks.train import train
from tests.test_experiments import REDUCED, compose

VOID = {"meta", "link", "img", "input", "path"}  # paths have end tags here, which close nothing open


class Page(HTMLParser):
    """Collects what a page holds, and complains of tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} comes twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(*runs: Path, out: Path | None = None, maps: bool = False) -> Page:
    """Writes the report of some runs and checks that it is a whole, accessible page without a way out."""
    words = [*map(str, runs), *(["--out", str(out)] if out else []), *([] if maps else ["--no-attention"])]
    assert main(words) == 0
    page = Page((out or runs[0] / "report.html").read_text())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for label in page.all("label"):
        assert label["for"] in ids
    for link in page.all("a"):
        assert link["href"].removeprefix("#") in ids
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("aria-hidden") or (svg["role"] == "img" and svg["aria-label"]) for svg in page.all("svg"))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not re.search(r"https?://|^//", value or ""), (tag, name)
            assert not name.startswith("on")
    return page


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """A run on digits of four steps that was continued to six."""
    runs = tmp_path_factory.mktemp("runs")
    for steps in (4, 6):
        more = ["name=real", f"max_steps={steps}", "log_every=1", "pictures_every=2", "model.image_size=32"]
        train(
            compose(f"runs={runs}", f"data.root={built_in}", *REDUCED, "model.patch_size=8", *more),
            Topology(rank=0, ranks=1, devices=1, nodes=1),
        )
    return runs / "real"


def synthetic(run: Path, steps: int, *changes: str, pictures: int = 0) -> Path:
    """Makes the folder of a run of ViT-B with so many logged steps, and so many reconstructions of photographs."""
    run.mkdir()
    config = compose("experiment=imagenet_base", "data.path=somewhere", *changes)
    settings = config.model_dump(mode="json", exclude={"plan", "suggest"}) | {"name": run.name}
    OmegaConf.save(OmegaConf.create(settings), run / "config.yaml")
    noise = torch.rand(steps, generator=torch.Generator().manual_seed(0)).tolist()
    log = MetricsCSV(run / "metrics.csv")
    names = ("train/loss", "train/lr", "perf/images_per_s", "perf/data_wait", "perf/mfu", "perf/memory_gb")
    log.log_metrics(dict.fromkeys(names, 0.5), 0)
    with open(run / "metrics.csv", "a") as file:
        file.writelines(f"{step + 1},{','.join([str(noise[step])] * len(names))}\n" for step in range(steps))
    (run / "reconstructions").mkdir()
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    crops = torch.stack([images[i % 2, :, 60 : 60 + 224, 50 * i : 50 * i + 224] for i in range(8)])
    for number in range(pictures):
        shifted = Reconstruction(crops, crops.roll(number, dims=-1), torch.ones(8, 196))
        file = run / "reconstructions" / f"step-{(number + 1) * steps // pictures:08d}.png"
        save_grid(reconstruction_columns(crops, shifted, 16), file, ["a title"])
    return run


def test_report_shows_settings_charts_and_reconstructions_of_a_run(real_run: Path) -> None:
    page = report(real_run, maps=True)
    fingerprint = json.loads((real_run / "derived.json").read_text())["data"]["fingerprint"]
    for said in ("finished after 6 steps", "resumed at step 4", fingerprint, "8 = 4 x 1 ranks x 2", "predict 0"):
        assert said in page.text
    assert page.text.count("↻") >= 6  # in every chart
    slider = next(tag for tag in page.all("input") if tag["type"] == "range")
    assert slider["max"] == "2"  # steps 2, 4 and 6
    pictures = [decoded(tag["src"]) for tag in page.all("img")]
    assert len(pictures) == 8 * 3 + 4 * 3
    original = read_grid(real_run / "reconstructions" / "step-00000006.png", (32, 32))
    assert original and pictures[0].tobytes() == original.rows[0][0].tobytes()
    assert "16 bits" not in page.text
    settings = real_run / "config.yaml"
    written = settings.read_text()
    settings.write_text(written.replace("bits: 8", "bits: 16"))
    assert (
        "sees 256 of them here: those of the pictures, from 0 (black) to 65,535 (white)"
        in report(real_run, maps=True).text
    )
    settings.write_text(written)


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,")))).convert("RGB")


def test_report_of_an_unfinished_run_shows_it_up_to_its_last_step(real_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(real_run, tmp_path / "going_on"))
    (run / "summary.json").unlink()
    with open(run / "metrics.csv", "a") as file:
        file.write("7,0.3")
    newest = run / "reconstructions" / "step-00000006.png"
    newest.write_bytes(newest.read_bytes()[:2000])
    page = report(run)
    assert "not finished: step 6 of 6" in page.text and "amaged" not in page.text
    assert next(tag for tag in page.all("input") if tag["type"] == "range")["max"] == "1"


def test_report_of_a_run_without_metrics_says_so(real_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    shutil.copy(real_run / "config.yaml", run)
    assert "No metrics yet" in report(run).text


def test_report_leaves_out_damaged_metrics_lines_and_counts_them(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "damaged", 20)
    lines = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    lines[3], lines[5], lines[8] = b"3,0.4,0.\xff\xfe\n", b"5" + b",x" * 6 + b"\n", b"\0\0\0\0\n"
    (run / "metrics.csv").write_bytes(b"".join(lines))
    page = report(run)
    assert "left out here: 3" in page.text
    assert len(read_metrics(run / "metrics.csv")) == 18


@pytest.mark.parametrize(
    ("file", "contents", "sentence"),
    [
        ("config.yaml", None, "no run folder"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "", "holds no settings"),
        ("config.yaml", "note: 1", "holds no settings of a run (not set: model, data, log_every)"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", '{"note": 1}', "summary.json is damaged: not set: step"),
        ("environment.json", '{"starts": []}', "environment.json is damaged: not set: python"),
        ("derived.json", '{"samples": "many"}', "derived.json is damaged: not set"),
        ("eval/knn.json", "[1, 2, 3]", "knn.json is damaged"),
        ("eval/linear.json", '{"trained": null}', "linear.json is damaged"),
    ],
)
def test_report_of_a_broken_run_folder_prints_one_error_line(
    file: str, contents: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = synthetic(tmp_path / "run", 3)
    (run / file).unlink(missing_ok=True)
    (run / "eval").mkdir()
    if contents is not None:
        (run / file).write_text(contents)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_report_passes_over_files_of_others_and_names_them(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 4, pictures=1)
    (run / "eval").mkdir()
    for name, contents in (("notes", "[1, 2, 3]"), ("mine", '{"trained": null}'), ("half", "{")):
        (run / "eval" / f"{name}.json").write_text(contents)
    shutil.copy(run / "reconstructions" / "step-00000004.png", run / "reconstructions" / "step-00000004 (1).png")
    Image.new("RGB", (3, 3)).save(run / "reconstructions" / "step-00000002.png")  # ours by its name alone
    lines = [
        "[]",
        "7",
        '{"key": "a", "reason": "cut"}',
        json.dumps({"shard": "s", "key": "k", "reason": "cut"}),
        "{cut",
    ]
    (run / "bad_samples.jsonl").write_text("\n".join(lines))
    text = re.sub(r"\s+", " ", report(run).text)
    for name in ("eval/notes.json", "eval/mine.json", "eval/half.json", "reconstructions/step-00000004 (1).png"):
        assert name in text
    assert "Damaged lines of bad_samples.jsonl, left out here: 3" in text and "1 in all" in text


def test_report_of_a_loss_that_is_not_finite_says_since_when(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 3)
    nan = dict.fromkeys(("train/loss", "val/loss", "rank/rankme"), float("nan"))
    for step in (4, 5, 6):
        MetricsCSV(run / "metrics.csv", step).log_metrics(nan | {"perf/mfu": 0.5, "new": 3.0}, step)
    page = report(run)
    assert re.search(r"training lossnot finitesince step 4, 0\.\d{4} before", page.text.replace("\n", ""))
    assert re.search(r"validation lossnot finitesince step 4", page.text.replace("\n", ""))
    for said in ("✕ train/loss not finite since step 4", "rank/rankme not finite since step 4"):
        assert said in page.text


def test_curve_is_interrupted_where_values_are_not_finite(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 3)
    for step, loss in enumerate((float("inf"), 0.5, 0.25), 4):
        MetricsCSV(run / "metrics.csv", step).log_metrics({"train/loss": loss}, step)
    page = report(run)
    assert "✕ train/loss not finite at step 4" in page.text
    line = next(path["d"] for path in page.all("path") if path["class"].startswith("line") and "1000.0" in path["d"])
    assert line.count("M") == 2 and line.count("L") == 4


def test_summary_of_a_loss_that_is_not_finite_says_since_when(tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    values = {"val/loss": 0.5, "perf/images_per_s": 9.0, "perf/data_wait": 0.0, "perf/mfu": 0.5, "perf/memory_gb": 1.0}
    log = MetricsCSV(run / "metrics.csv")
    for step, loss in enumerate((0.75, float("nan"), float("nan")), 1):
        log.log_metrics(values | {"train/loss": loss, "guard/skipped": step, "val/first_iou": 0.25}, step)
    summary = summarise(run, Schedule(96, 32, 32, 1, 1, 1, 3, 3, 0, 1e-3, 0.0), 3, {})
    draw_loss_curve(run, {})
    assert summary["train/loss"] is None and summary["not_finite"] == {"train/loss": 2}
    monkeypatch.setattr("sys.argv", ["summary", str(run)])
    assert summary_main() == 0
    said = capsys.readouterr().out
    assert "train not finite since step 2, val 0.5000" in said and "first IoU" in said and "25.00%" in said
    for file, contents in (
        ("eval/knn.json", '{"trained": []}'),
        ("summary.json", '{"note": 1}'),
        ("summary.json", "{"),
    ):
        (run / "eval").mkdir(exist_ok=True)
        (run / file).write_text(contents)
        assert summary_main() == 2
        error = capsys.readouterr().err
        assert f"{file} is damaged" in error and error.count("\n") == 1


def test_runs_on_one_page_have_lines_of_their_own(tmp_path: Path) -> None:
    runs = [synthetic(tmp_path / f"run{number:02d}", 2) for number in range(20)]
    for run in runs:
        MetricsCSV(run / "metrics.csv", 2).log_metrics({"val/loss": 0.5}, 2)
    page = report(*runs, out=tmp_path / "all.html")
    keys = [path["class"] for path in page.all("path") if path.get("d") == "M0 2h40"]
    assert len(keys[:40]) == len(set(keys[:40]))  # of the loss: two metrics of each run


def test_report_hides_credentials_that_earlier_versions_kept(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 3)
    url = "http://user:pa55@h/a.tar?X-Amz-Signature=s3cr3t&part=s3cr3t"
    with open(run / "config.yaml", "a") as file:
        file.write(f"\nelsewhere: ['{url}', 'hf://datasets/user/name@main']\n")
    (run / "bad_samples.jsonl").write_text(json.dumps({"shard": url, "key": "a", "reason": "cut"}) + "\n")
    page = report(run)
    assert "http://hidden@h/a.tar?X-Amz-Signature=hidden" in page.text and "name@main" in page.text
    assert not re.search("pa55|s3cr3t", (run / "report.html").read_text())


def test_report_to_an_unwritable_place_exits_with_2_and_suggests_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = synthetic(tmp_path / "run", 3)
    assert main([str(run), "--out", str(tmp_path / "absent" / "report.html")]) == 2
    assert "Choose another place with --out" in capsys.readouterr().err


@pytest.mark.slow
def test_report_of_1000_steps_with_pictures_stays_below_5_mb(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 1000, pictures=25)
    page = report(run)
    size = (run / "report.html").stat().st_size
    print(f"{size / 1e6:.2f} MB")
    assert size < 5_000_000
    steps = json.loads(re.findall(r'"steps": (\[.*?\])', (run / "report.html").read_text())[0])
    assert len(steps) == 24 and steps[0] == 40 and steps[-1] == 1000
    assert len([svg for svg in page.all("svg") if "aria-label" in svg]) == 6


def test_report_of_100000_steps_stays_below_500_kb(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 100_000)
    report(run)
    assert (run / "report.html").stat().st_size < 500_000


def test_thinning_keeps_the_ends_and_the_extremes() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(1)).tolist()
    values[77_777], values[33_333] = 9.0, -9.0
    points = list(enumerate(values))
    kept = thin(points)
    assert len(kept) <= 2 * BUCKETS and kept == sorted(kept)
    assert {points[0], points[-1], points[77_777], points[33_333]} <= set(kept)
    assert thin(points[:600]) == points[:600]


@pytest.mark.parametrize(
    "values",
    [
        [0.4, 1.26],
        [0.0],
        [5.0],
        [-3e-7, 2e-7],
        [0, 1_234_567],
        [1e-12, 1e-12],
        [123456.789, 123456.78900000002],
        [1.0, 1.0001],
        [0, 5e-324],
        [-1e308, 1e308],
    ],
)
def test_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    low, high, ticks = axis(values)
    assert low < high and (max(map(abs, values)) > LARGEST or low <= min(values) <= max(values) <= high)
    assert len({tick.label for tick in ticks}) == len(ticks)
    assert 3 <= len(ticks) <= 7 and ticks[0].place == 0 and ticks[-1].place == 100


def test_report_of_two_runs_shares_charts_and_lists_their_differences(tmp_path: Path) -> None:
    first = synthetic(tmp_path / "first", 50)
    second = synthetic(tmp_path / "second", 80, "optim.base_lr=3e-4", "model.mask_ratio=0.6")
    page = report(first, second, out=tmp_path / "both.html")
    rows = re.sub(r"\s+", " ", page.text)
    assert "model.mask_ratio" in rows and "optim.base_lr" in rows and "model.width" not in rows.split("Training")[0]
    loss = json.loads(next(tag["data-lines"] for tag in page.all("div") if "data-lines" in tag))
    ends = [(line["label"], line["points"][0][-1]) for line in loss]
    assert ends == [("first train/loss", 50), ("second train/loss", 80)]
    assert {tag["for"] for tag in page.all("label")} == set()  # no reconstructions, no slider


def test_report_escapes_markup_in_names_and_settings(tmp_path: Path) -> None:
    nasty = "</script></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    run = synthetic(tmp_path / "a<b>&'\"c", 3)
    with open(run / "config.yaml", "a") as file:
        file.write(f"note: {json.dumps(nasty)}\n")
    bad = {"shard": nasty, "key": nasty, "reason": nasty}
    (run / "bad_samples.jsonl").write_text(f"{json.dumps(bad)}\n{json.dumps(bad)}\n{{cut off")
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace("perf/mfu", "</svg><script>'x'</script>", 1))
    page = report(run, out=tmp_path / "report.html")
    assert len(page.all("script")) == 1 and not page.all("img")
    assert page.text.count(nasty[:-3]) == 4  # config.yaml, shard, key, reason
    assert "a<b>&'\"c" in page.text


def test_report_shows_probes_and_metrics_of_other_tasks(tmp_path: Path) -> None:
    run = synthetic(tmp_path / "run", 3)
    values = {"knn/top1": 0.5, "rank/rankme": 17.0, "val/first_iou": 0.25, "val/last_iou": 0.375, "new": 1}
    MetricsCSV(run / "metrics.csv", 3).log_metrics(values, 3)
    (run / "eval").mkdir()
    probe = {"trained": {"top1": 0.875, "C": 3}, "untrained": {"top1": 0.25, "C": 1}, "settings": {"k": 20}}
    probe |= {"floors": {"largest class": 0.125}, "test_images": 1000}
    (run / "eval" / "knn.json").write_text(json.dumps(probe))
    Image.new("RGB", (30, 20)).save(run / "eval" / "knn.png")
    losses = {model: {"loss": {"0.75": value}} for model, value in (("trained", 0.5), ("untrained", 1.0))}
    (run / "eval" / "on-other-1234").mkdir()
    (run / "eval" / "on-other-1234" / "reconstruct.json").write_text(
        json.dumps(losses | {"floors": {"0.75": {"scaled interpolation": 0.625}}, "floor_images": 256})
    )
    page = report(run)
    text = re.sub(r"\s+", " ", page.text)
    for said in (
        "Top-1 accuracy",
        "RankMe",
        "Mean IoU of the masks",
        "mean IoU, first prompt",
        "37.5%",
        "new",
        "50.0%",
    ):
        assert said in text
    for said in (
        "knn, top-1 87.5% 25.0% largest class 12.5%",
        "reconstruct on other-1234, loss, 75% hidden 0.5 1 scaled interpolation 0.625",
        "C 3 trained, 1 untrained",
        "test images 1,000",
    ):
        assert said in re.sub(r"(?<=\S)(?=<)", " ", text) or said in spaced(run), said
    assert [image["alt"] for image in page.all("img")] == ["knn"]


def spaced(run: Path) -> str:
    """Returns the text of a report with a blank between cells."""
    return " ".join(re.sub(r"<[^>]*>", " ", (run / "report.html").read_text()).split())


def test_attention_weights_equal_those_of_timm() -> None:
    config = compose(*REDUCED, "model.image_size=32", "model.patch_size=8", "model.depth=3").model
    encoder, replaced = mae.Encoder(config).eval(), mae.Encoder(config).eval()
    replaced.load_state_dict(encoder.state_dict())
    seen = []
    for block in replaced.blocks:
        theirs = Attention(config.width, config.num_heads, qkv_bias=True)
        theirs.load_state_dict(block.attn.state_dict())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        theirs.fused_attn = False  # pyright: ignore[reportAttributeAccessIssue]
        theirs.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output.mean(1)))
        block.attn = theirs
    images = torch.randn(2, 3, 32, 32)
    replaced.encode(images)
    expected = torch.stack(seen, 1)
    weights = attention_weights(encoder, images)
    torch.testing.assert_close(weights, expected.detach())
    torch.testing.assert_close(rollout(weights).sum(-1), torch.ones(2, 17))
    uniform = torch.full((1, 4, 4), 0.25)
    torch.testing.assert_close(rollout(uniform), (torch.eye(4) + 0.25) / 2)


@pytest.mark.parametrize("size", [(32, 32), (48, 160), (224, 224)])
def test_read_grid_gives_back_the_images_of_a_saved_grid(size: tuple[int, int], tmp_path: Path) -> None:
    images = torch.randint(256, (5, 3, *size)) / 255
    painted = Reconstruction(images, images.flip(0), torch.ones(5, size[0] * size[1] // 256))
    file = tmp_path / "grid.png"
    save_grid(reconstruction_columns(images, painted, 16), file, ["a title", "a second line"])
    with Image.open(file) as picture:
        assert picture.width > picture.height
    grid = read_grid(file, size)
    assert grid is not None and len(grid.rows) == 5
    for row, image, rebuilt in zip(grid.rows, images, images.flip(0), strict=True):
        for cell, expected in ((row[0], image), (row[2], rebuilt)):
            assert cell.tobytes() == (expected * 255).round().byte().permute(1, 2, 0).numpy().tobytes()
    assert (grid.originals(3, 8) == (images * 255).round()).all()


def test_read_grid_reads_pictures_of_earlier_versions_with_an_image_per_row(tmp_path: Path) -> None:
    columns = torch.rand(2, 3, 3, 128, 128)
    rows = rearrange(tiles(columns.flatten(0, 1)), "(b k) c h w -> c (b h) (k w)", k=3)
    for lines in (2, 3):  # of the caption
        add_caption(rows, ["a line"] * lines).save(tmp_path / "old.png")
        grid = read_grid(tmp_path / "old.png", (128, 128))
        assert grid is not None and len(grid.rows) == 2
        assert (grid.originals(3, 8) == (columns[:, 0] * 255).round()).all()


def test_pictures_of_16_bits_are_stretched_and_read_back_on_their_own_scale(tmp_path: Path) -> None:
    images = torch.randint(100, 4096, (4, 1, 128, 128), dtype=torch.int32).to(torch.uint16)
    shown = shown_range(images)
    assert shown == pytest.approx((100 / 65535, 4095 / 65535), rel=0.05)
    unit = images.float() / 65535
    painted = Reconstruction(unit, stretch(unit, shown), torch.ones(4, 64))
    save_grid(reconstruction_columns(stretch(unit, shown), painted, 16), tmp_path / "grid.png", ["dark"], shown)
    grid = read_grid(tmp_path / "grid.png", (128, 128))
    assert grid is not None and 100 < np.median(np.asarray(grid.rows[0][0])) < 156  # was 8
    found = grid.originals(1, 16)
    assert found.dtype == torch.uint16 and (found.float() - images.float()).abs().max() <= 16


def test_report_scales_large_pictures_down_to_224_pixels() -> None:
    assert max(decoded(picture_url(Image.new("RGB", (1024, 512)))).size) == 224


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_page_works_in_a_browser_at_each_width_and_scheme(
    browser: Any, width: int, scheme: str, real_run: Path
) -> None:
    report(real_run, maps=True)
    complaints: list[str] = []
    with browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True) as context:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto((real_run / "report.html").as_uri())
        for details in page.locator("details").all():
            details.locator("summary").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        slider, picture = page.get_by_role("slider", name="Step"), page.locator("img.reconstructed").first
        shown = picture.get_attribute("src")
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext") == "step 4"
        assert picture.get_attribute("src") != shown
        page.keyboard.press("Home")
        assert page.locator(".slider output").text_content() == "2"
        chart = page.locator(".plot").first
        chart.focus()
        page.keyboard.press("Home")
        assert "step 1" in chart.locator(".tip").inner_text() and "train/loss" in chart.locator(".tip").inner_text()
        page.keyboard.press("Escape")
        assert not chart.locator(".tip").is_visible()
        chart.hover()
        assert chart.locator(".tip").is_visible()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 384) == (scheme == "dark")
    assert complaints == []
