"""python -m mae.demo: a photograph, a mask, what the model makes of them, on a page of this machine."""

import asyncio
import base64
import io
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from skimage.data import chelsea
from torch import Tensor

import mae
from mae.demo.__main__ import main, private_uploads
from mae.demo.gallery import open_gallery
from mae.demo.model import DemoModel, draw_mask, max_mask_percent, open_model
from mae.demo.photo import fit_to_model, read_photograph
from mae.demo.views import Views, load_examples
from mae.distributed.launch import Topology
from mae.models.attention_maps import attention_weights, rollout
from mae.models.patches import patchify
from mae.pictures.draw import save_grid, shown_range, stretch, to_image
from tasks.evaluate import evaluate
from tasks.train import train
from tests.exports import own_checkpoint
from tests.processes import finish, start
from tests.test_eval import settings
from tests.test_experiments import REDUCED, compose

ALONE = Topology(rank=0, ranks=1, devices=1, nodes=1)
CAT = Image.fromarray(chelsea())  # 451 x 300


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory, built_in: Path) -> Path:
    """A run on digits of two steps, with features and thumbnails of some training images."""
    runs = tmp_path_factory.mktemp("runs")
    more = ["name=real", "pictures_every=2", "model.image_size=32", "model.patch_size=4"]
    train(compose(f"runs={runs}", f"data.root={built_in}", *REDUCED, *more), ALONE)
    evaluate(settings(runs / "real", "probe=neighbours", "probe.train_images=300"), ALONE)
    return runs / "real"


def seen(photo: Tensor) -> Tensor:
    return rearrange(photo[0].float(), "c h w -> h w c")


def config(**fields: Any) -> mae.MAEConfig:
    return mae.MAEConfig(image_size=(48, 96), **fields)


def saved(image: Image.Image, file: Path, **how: Any) -> Path:
    image.save(file, **how)
    return file


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def turned(file: Path) -> Path:
    """A photograph that lies on its side, and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(CAT.rotate(90, expand=True), file, quality=95, exif=exif)


@pytest.mark.parametrize("channels", [1, 3])
def test_photograph_reads_the_same_from_each_file_format(channels: int, tmp_path: Path) -> None:
    model = config(in_channels=channels)
    expected = seen(fit_to_model(CAT.convert("L") if channels == 1 else CAT, model))
    assert expected.shape == (48, 96, channels)
    grey = expected if channels == 1 else seen(fit_to_model(CAT.convert("L"), model))
    alpha = CAT.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(CAT.size))
    for file, wanted, tolerance in (
        (saved(CAT, tmp_path / "plain.png"), expected, 0),
        (saved(alpha, tmp_path / "alpha.png"), expected, 0),
        (saved(CAT.convert("CMYK"), tmp_path / "cmyk.jpg", quality=95), expected, 4),
        (saved(CAT.convert("L"), tmp_path / "grey.png"), grey, 0),
        (saved(CAT.convert("LA"), tmp_path / "grey_alpha.png"), grey, 0),
        (saved(sixteen_bits(CAT), tmp_path / "sixteen.png"), grey, 0),
        (saved(CAT.convert("P"), tmp_path / "palette.png", transparency=0), expected, 16),
        (saved(CAT, tmp_path / "photo.tiff"), expected, 0),
        (turned(tmp_path / "turned.jpg"), expected, 4),
    ):
        photo = fit_to_model(read_photograph(file), model)
        assert photo.dtype == torch.uint8 and photo.shape == (1, channels, 48, 96), file
        assert (seen(photo) - wanted).abs().mean() <= tolerance, file


@pytest.mark.parametrize("shape", [(20, 2000), (2000, 20), (1, 1)])
def test_photograph_of_extreme_shape_is_fitted_to_the_model(shape: tuple[int, int]) -> None:
    assert fit_to_model(Image.new("RGB", shape, "red"), config()).flatten(2).float().mean(2).tolist() == [[255, 0, 0]]


def test_grey_photograph_keeps_16_bits_for_a_model_trained_on_them(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (96, 192), np.uint16)
    photo = fit_to_model(read_photograph(saved(Image.fromarray(values), tmp_path / "x.png")), config(), bits=16)
    assert photo.dtype == torch.uint16 and photo.shape == (1, 3, 48, 96) and len(np.unique(photo.numpy())) > 1000
    drawn = np.asarray(to_image(photo[0]))
    assert drawn.min() == 0 and drawn.max() == 255 and 100 < np.median(drawn) < 156
    model = random_model(tmp_path)
    assert model.bits == 8 and (seen(fit_to_model(CAT, config(), bits=16)) == seen(fit_to_model(CAT, config()))).all()


def test_demo_of_16_bits_stretches_pictures_and_says_when_a_photograph_has_8(tmp_path: Path) -> None:
    model = replace(random_model(tmp_path, in_channels=1), bits=16)
    size = model.config.image_size
    images = torch.randint(0, 4096, (4, 1, *size), dtype=torch.int32).to(torch.uint16)
    columns = stretch(images.float() / 65535, shown_range(images))[:, None].expand(-1, 3, -1, -1, -1)
    (tmp_path / "reconstructions").mkdir()
    save_grid(columns, tmp_path / "reconstructions" / "step-00000001.png", [], shown_range(images))
    examples = load_examples(replace(model, path=tmp_path))
    views = Views(model, None, examples)
    assert [photo.dtype for _, photo in examples] == [torch.uint16] * 4 + [torch.uint8]
    assert (examples[0][1][0].float() - images[0].float()).abs().max() <= 16
    assert views.remark(examples[0][1]) == "" and "256 values are seen of 65,536" in views.remark(examples[-1][1])
    assert "16 bits" in views.heading()
    shown = views.reconstruction(examples[0][1], draw_mask(model.config, 0.5, "random", 0))
    data = re.findall(r"data:image/png;base64,([^\"]+)", shown[0])[0]
    assert 100 < np.median(np.array(Image.open(io.BytesIO(base64.b64decode(data))))) < 156  # was 8


def test_colours_of_16_bits_are_refused_for_a_model_trained_on_them(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 4096, (8, 8, 3), np.uint16)
    tifffile.imwrite(tmp_path / "x.tiff", colours, photometric="rgb")
    (tmp_path / "x.ppm").write_bytes(b"P6\n8 8\n65535\n" + colours.astype(">u2").tobytes())
    for name in ("x.tiff", "x.ppm"):
        assert read_photograph(tmp_path / name).mode == "RGB"
        with pytest.raises(mae.ConfigError, match=f"{name} holds colours of 16 bits, of which 8 would be read"):
            read_photograph(tmp_path / name, bits=16)
    for name in ("x.png", "x.jpg", "x.webp"):
        assert read_photograph(saved(CAT, tmp_path / name), bits=16).size == CAT.size


def test_png_with_megabytes_of_text_is_read_as_a_photograph(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    assert read_photograph(saved(CAT, tmp_path / "x.png", pnginfo=text)).size == CAT.size


def broken(tmp_path: Path) -> list[tuple[Path, str]]:
    whole = saved(CAT, tmp_path / "whole.jpg").read_bytes()
    files = {"text.jpg": b"no image at all", "empty.png": b"", "cut.jpg": whole[: len(whole) // 2]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    real = saved(Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32)), tmp_path / "real.tiff")
    found = [(tmp_path / name, f"{name} cannot be read as an image") for name in files]
    for dtype in (np.int8, np.int16, np.int32, np.uint32):
        tifffile.imwrite(tmp_path / f"{np.dtype(dtype)}.tiff", np.ones((8, 8), dtype))
        said = "signed numbers" if np.dtype(dtype).kind == "i" else "32 bits per channel"
        found.append((tmp_path / f"{np.dtype(dtype)}.tiff", f"holds {said}, not a photograph"))
    planes = np.ones((3, 8, 8), np.uint16)
    tifffile.imwrite(tmp_path / "planes.tiff", planes, photometric="rgb", planarconfig="separate")
    found.append((tmp_path / "planes.tiff", "planes.tiff holds 16-bit channels in planes"))
    return [*found, (real, "real.tiff holds real numbers")]


def test_unreadable_photograph_raises_one_line_config_error(tmp_path: Path) -> None:
    for file, said in broken(tmp_path):
        with pytest.raises(mae.ConfigError, match=said) as raised:
            read_photograph(file)
        assert "\n" not in str(raised.value)


def random_model(tmp_path: Path, **fields: Any) -> DemoModel:
    return open_model(own_checkpoint(tmp_path, **fields)[1])


@pytest.mark.parametrize("fields", [{}, {"image_size": (32, 64)}, {"in_channels": 1}, {"norm_pix": False}])
def test_reconstruction_keeps_visible_patches_and_has_the_loss_of_the_model(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(tmp_path, **fields)
    photo, mask = fit_to_model(CAT, model.config), draw_mask(model.config, 0.6, "random", 1)
    painted = model.reconstruct(photo, mask)
    hidden, size = mask.bool()[None], model.config.patch_size
    original, pasted, predicted = (patchify(one, size) for one in (photo / 255, painted.pasted, painted.predicted))
    torch.testing.assert_close(pasted[~hidden], original[~hidden])
    assert torch.equal(pasted[hidden], predicted[hidden])
    assert (pasted[hidden] - original[hidden]).abs().mean() > 0.01
    assert (predicted[~hidden] - original[~hidden]).abs().mean() > 0.01
    assert isinstance(model.encoder, mae.MaskedAutoencoder)
    assert painted.loss == float(model.encoder(model.images(photo), mask=mask[None]).loss.detach())


def test_mask_is_determined_by_the_seed_and_never_hides_all_or_no_patches() -> None:
    model = mae.MAEConfig(image_size=(64, 96), patch_size=16)  # 24 patches
    for kind in ("random", "block", "grid"):
        masks = [draw_mask(model, 0.7, kind, seed) for seed in (3, 3, 4)]
        assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    for percent in (1, 50, max_mask_percent(model)):
        assert 1 <= draw_mask(model, percent / 100, "random", 0).sum() <= 23
    assert max_mask_percent(model) == 95


def test_attention_map_is_that_of_the_chosen_patch(tmp_path: Path) -> None:
    for tokens in (1, 0, 3):
        model = random_model(tmp_path, class_tokens=tokens, image_size=(32, 64))
        photo = fit_to_model(CAT, model.config)
        weights = attention_weights(model.encoder, model.images(photo))[0]
        for block, looking in ((0, weights[0]), (None, rollout(weights))):
            expected = looking[5 + tokens, tokens:]
            torch.testing.assert_close(model.attention(photo, 5, block).flatten(), expected.detach())


def test_nearest_neighbour_of_a_training_image_is_itself(real_run: Path, tmp_path: Path) -> None:
    model = open_model(real_run)
    gallery = open_gallery(model)
    assert gallery is not None and len(gallery.thumbnails) == 300
    for row in (0, 17, 299):
        photo = gallery.thumbnails[row : row + 1]  # as large as the images of this model
        nearest = gallery.nearest(model.feature(photo, gallery.kind), 5)
        assert nearest[0].sample == int(gallery.features.samples[row])
        assert nearest[0].similarity == pytest.approx(1, abs=1e-3)
        assert [one.similarity for one in nearest] == sorted((one.similarity for one in nearest), reverse=True)
        assert all(one.name in "0123456789" for one in nearest)
    folder = shutil.copytree(real_run, tmp_path / "run")
    (folder / "eval" / "neighbours.json").unlink()
    without_names = open_gallery(open_model(folder))
    assert without_names is not None and re.fullmatch(
        r"class \d", without_names.nearest(gallery.features.values[:1], 1)[0].name
    )


def test_gallery_of_other_weights_is_not_used(real_run: Path, tmp_path: Path) -> None:
    _, path = own_checkpoint(tmp_path)
    shutil.copytree(real_run / "eval", tmp_path / "eval")
    model = open_model(path)
    assert open_gallery(model) is None
    shown = Views(model, None, load_examples(model)).neighbours(fit_to_model(CAT, model.config))
    assert f"python eval.py checkpoint={path} probe=neighbours" in shown


def test_demo_of_an_encoder_shows_attention_without_reconstruction(tmp_path: Path) -> None:
    encoder = mae.Encoder(mae.MAEConfig(image_size=32, patch_size=8, width=192, depth=2, num_heads=3))
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    model = open_model(tmp_path / "encoder.pth")
    views, photo = Views(model, None, load_examples(model)), fit_to_model(CAT, model.config)
    assert "holds an encoder only" in views.reconstruction(photo, draw_mask(model.config, 0.5, "random", 0))[-1]
    assert "normalised as ImageNet is" in views.heading()
    assert "row 1, column 3 in block 2" in views.attention(photo, 2, 1)[1]


def test_markup_in_a_path_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>&\"'"
    folder.mkdir()
    model = random_model(folder)
    shown = Views(model, None, load_examples(model)).neighbours(fit_to_model(CAT, model.config))
    assert "<b>" not in shown and "&lt;b&gt;" in shown


def test_demo_command_with_wrong_arguments_prints_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    _, thirteen = own_checkpoint(tmp_path, in_channels=13)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, said in (
            ([str(thirteen), "--port", "0"], "takes images of 13 channels"),
            ([str(tmp_path / "absent"), "--port", "0"], "does not exist"),
            (["run", "--port", str(taken.getsockname()[1])], "Address already in use"),
            (["run", "--port", "70000"], "--port 70000 is no port"),
            (["run", "--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address"),
            (["run", "--host", "a..b"], "--host a..b is no address"),
            (["run", "--root-path", "user"], "--root-path user is no address"),
        ):
            assert main(words) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_demo_command_without_gradio_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["run"]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_demo_command_prints_its_address_and_removes_its_uploads(real_run: Path, tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx", reason="comes with gradio")
    process = start([sys.executable, "-m", "mae.demo", str(real_run), "--port", "0"], TMPDIR=str(tmp_path))
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    assert url.startswith("http://127.0.0.1:")
    answer = httpx.get(url, trust_env=False)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    foreign = httpx.get(url, headers={"host": "evil.example:7860"}, trust_env=False)
    assert foreign.status_code == 403 and "does not answer to the name evil.example" in foreign.text
    httpx.post(f"{url}/gradio_api/upload", files={"files": ("cat.png", b"cat")}, trust_env=False).raise_for_status()
    assert any(file.read_bytes() == b"cat" for file in tmp_path.rglob("*") if file.is_file())
    process.terminate()
    assert finish(process) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("host", "method", "headers", "status"),
    [
        ("127.0.0.1", "GET", {"host": "127.0.0.1:7860"}, None),
        ("127.0.0.1", "GET", {"host": "localhost:8888"}, None),  # through ssh -L
        ("127.0.0.1", "GET", {"host": "[::1]:7860"}, None),
        ("127.0.0.1", "GET", {"host": "Evil.example:7860"}, 403),
        ("127.0.0.1", "GET", {"host": "127.0.0.1.evil.example"}, 403),
        ("127.0.0.1", "GET", {"host": "localhost.evil.example"}, 403),
        ("127.0.0.1", "GET", {"host": socket.gethostname() + "x"}, 403),
        ("127.0.0.1", "GET", {}, 403),
        ("127.0.0.1", "GET", {"host": "[::1"}, 403),
        ("0.0.0.0", "GET", {"host": "10.1.2.3:7860"}, None),
        ("0.0.0.0", "GET", {"host": socket.gethostname()}, None),
        ("0.0.0.0", "GET", {"host": "evil.example"}, 403),
        ("Gpu7.cluster", "GET", {"host": "gpu7.cluster:7860"}, None),
        ("127.0.0.1", "POST", {"host": "localhost", "content-length": "1000"}, None),
        ("127.0.0.1", "POST", {"host": "localhost", "content-length": str(300 << 20)}, 413),
        ("127.0.0.1", "POST", {"host": "localhost", "transfer-encoding": "chunked"}, 411),
        ("127.0.0.1", "POST", {"host": "localhost", "content-length": "9", "sec-fetch-site": "cross-site"}, 403),
        ("127.0.0.1", "POST", {"host": "localhost", "content-length": "9", "sec-fetch-site": "same-site"}, 403),
        ("127.0.0.1", "POST", {"host": "localhost", "content-length": "9", "sec-fetch-site": "same-origin"}, None),
        # Browsers tell addresses without https the origin alone.
        ("0.0.0.0", "POST", {"host": "10.1.2.3:80", "content-length": "9", "origin": "http://evil.example"}, 403),
        ("0.0.0.0", "POST", {"host": "10.1.2.3:80", "content-length": "9", "origin": "null"}, 403),
        ("0.0.0.0", "POST", {"host": "10.1.2.3:80", "content-length": "9", "origin": "http://10.1.2.3:80"}, None),
    ],
)
def test_demo_refuses_foreign_hosts_other_sites_and_large_uploads(
    host: str, method: str, headers: dict[str, str], status: int | None
) -> None:
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    from mae.demo.serve import names_of_host, refuse

    scope = {"method": method, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    refused = refuse(scope, names_of_host(host))
    assert (refused and refused[0]) == status


@pytest.mark.parametrize(
    ("root_path", "expected"),
    [
        ("", ("", "")),
        ("/user/x/proxy/7860/", ("", "/user/x/proxy/7860")),
        ("https://Hub.example/user/x", ("https://hub.example", "/user/x")),
        ("http://hub.example:8000", ("http://hub.example:8000", "")),
        *((wrong, None) for wrong in ("user/x", "ftp://hub/x", "//hub/x?y", "https://", "/x?y=1", "http://[::1")),
    ],
)
def test_root_path_is_an_address_or_a_path(root_path: str, expected: tuple[str, str] | None) -> None:
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    from mae.demo.serve import Proxy

    if expected is None:
        with pytest.raises(mae.ConfigError, match=r"--root-path .* is no address: give the one that the browser shows"):
            Proxy.behind(root_path)
    else:
        assert Proxy.behind(root_path) == expected


@pytest.fixture(scope="module")
def proxied(real_run: Path) -> Iterator[str]:
    """Yields the address of the page behind a proxy that strips the prefix and names another host."""
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    import uvicorn

    from mae.demo.page import Page
    from mae.demo.serve import Proxy, application, listen

    model = open_model(real_run)
    with listen("127.0.0.1", 0) as at, private_uploads():
        address = f"http://127.0.0.1:{at.getsockname()[1]}/user/x/proxy/7860"
        page = Page(Views(model, None, load_examples(model))).blocks
        inner = application(page, proxy=Proxy.behind(address))

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                # Requests outside of the prefix belong to somebody else.
                inside = scope["path"].startswith("/user/x/proxy/7860/")
                path = scope["path"].removeprefix("/user/x/proxy/7860") if inside else "/of-somebody-else"
                headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
                scope = scope | {"path": path, "headers": [*headers, (b"host", b"127.0.0.1:7860")]}
            await inner(scope, receive, send)

        server = uvicorn.Server(uvicorn.Config(proxy, ws="none", log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"{address}/"
        server.should_exit = True
        thread.join()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradio's own use of pandas
@pytest.mark.slow
def test_demo_page_works_behind_a_proxy_with_a_prefix(browser: Any, proxied: str, tmp_path: Path) -> None:
    with browser.new_context() as context:
        page, complaints = opened(context, proxied)
        assert hidden(page).float().mean() == 0.75
        upload(page, saved(CAT, tmp_path / "cat.png"))
        page.get_by_role("slider").fill("25")
        page.get_by_text("16 of 64 patches hidden").wait_for()
        assert check_reconstruction(page) == 0.25
    assert complaints == []


def test_demo_answers_under_its_prefix_whether_the_proxy_strips_it_or_not(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    import gradio
    import httpx

    from mae.demo.serve import Proxy, application

    async def ask() -> None:
        with gradio.Blocks(analytics_enabled=False) as page:  # opens a loop of its own where none runs
            gradio.HTML("a page")
        app = application(page, proxy=Proxy.behind("https://hub.example/user/x"))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://hub.example") as client:
            for path in ("/config", "/user/x/config"):
                answer = await client.get(path)
                assert answer.json()["root"] == "https://hub.example/user/x"
                assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
            assert (await client.get("/config", headers={"host": "evil.example"})).status_code == 403
            for site, refused in (("https://hub.example", False), ("https://evil.example", True)):
                answer = await client.post("/user/x/none", headers={"origin": site}, content=b"x")
                assert (answer.status_code == 403) == refused

    with private_uploads():
        asyncio.run(ask())


@pytest.fixture(scope="module")
def address(real_run: Path) -> Iterator[str]:
    """Serves the page of the run and yields its address."""
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    from mae.demo.page import Page
    from mae.demo.serve import build_server, listen

    model = open_model(real_run)
    with listen("127.0.0.1", 0) as at, private_uploads():
        answering = build_server(Page(Views(model, open_gallery(model), load_examples(model))).blocks)
        thread = threading.Thread(target=answering.run, kwargs={"sockets": [at]})
        thread.start()
        while not answering.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        answering.should_exit = True
        thread.join()


def opened(context: Any, address: str, pictures: int = 2) -> tuple[Any, list[str]]:
    """Opens the page in a browser that reaches this machine alone; the list fills with complaints as it is used.

    pictures  that answer to the pointer
    """
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(60_000)

    def check(route: Any) -> None:
        if route.request.url.startswith(address):
            route.continue_()
        else:
            complaints.append(route.request.url)
            route.abort()

    def listen(message: Any) -> None:
        if message.text != "Method not implemented.":  # gradio's own, of each stream that it closes
            complaints.append(message.text)

    page.route("**", check)
    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    # The page is there before its script is: a stroke before that would be lost.
    page.locator("p.unseen").nth(pictures - 1).wait_for(state="attached")
    return page, complaints


def pixels(page: Any, title: str) -> Tensor:
    """Returns the picture with this title as it lies in the page, in patches of 4 pixels: [64, 48]."""
    url = page.get_by_alt_text(title, exact=True).get_attribute("src")
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    return patchify(rearrange(image, "h w c -> 1 c h w"), 4)[0]


def hidden(page: Any) -> Tensor:
    """Returns the mask of the page, once the reconstruction says the same: [64]"""
    mask = torch.tensor([int(one) for one in page.locator("[data-mask]").first.get_attribute("data-mask")])
    page.get_by_text(f"{int(mask.sum())} of 64 patches hidden").wait_for()
    return mask.bool()


# A browser waits until the mask is another one.
OTHER_MASK = "bits => document.querySelector('.patches').dataset.mask !== bits"


def bits(mask: Tensor) -> str:
    return "".join(str(int(one)) for one in mask)


def centre(page: Any, number: int, place: tuple[int, int]) -> tuple[float, float]:
    """Returns where a patch of a picture of patches is in the window: x, y."""
    field = page.locator(".patches").nth(number)
    field.scroll_into_view_if_needed()
    box = field.bounding_box()
    return box["x"] + box["width"] * (place[1] + 0.5) / 8, box["y"] + box["height"] * (place[0] + 0.5) / 8


def drag(page: Any, start: tuple[int, int], end: tuple[int, int]) -> None:
    """A stroke over the masked picture, and the wait until its answer is there."""
    before = page.locator(".patches").first.get_attribute("data-mask")
    page.mouse.move(*centre(page, 0, start))
    page.mouse.down()
    page.mouse.move(*centre(page, 0, end))
    page.mouse.up()
    page.wait_for_function(OTHER_MASK, arg=before)


def upload(page: Any, file: Path) -> None:
    """Gives the page a photograph, and waits until it is there."""
    before = page.get_by_alt_text("Original", exact=True).get_attribute("src")
    page.locator("input[type=file]").set_input_files(file)
    page.wait_for_function("before => document.querySelector('img[alt=Original]').src !== before", arg=before)


def check_reconstruction(page: Any) -> float:
    """Visible patches are as they were, hidden ones are not; returns the share that is hidden."""
    mask = hidden(page)
    changed = (pixels(page, "Original") != pixels(page, "Reconstruction")).any(1)
    assert torch.equal(changed, mask)
    assert (pixels(page, "Original") != pixels(page, "Prediction")).any(1).all()
    return float(mask.float().mean())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradio's own use of pandas
def test_demo_page_answers_each_control_from_upload_to_neighbours(
    browser: Any, address: str, real_run: Path, tmp_path: Path
) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page, complaints = opened(context, address)
        assert hidden(page).float().mean() == 0.75
        upload(page, turned(tmp_path / "cat.jpg"))
        check_reconstruction(page)
        upright = patchify(fit_to_model(CAT, open_model(real_run).config), 4)[0]
        assert (pixels(page, "Original").float() - upright.float()).abs().mean() < 4

        page.get_by_role("slider").fill("25")
        page.get_by_text("16 of 64 patches hidden").wait_for()
        assert check_reconstruction(page) == 0.25
        before = hidden(page)
        page.get_by_role("button", name="New mask").click()
        page.wait_for_function(OTHER_MASK, arg=bits(before))
        assert check_reconstruction(page) == 0.25

        page.get_by_role("button", name="Show all").click()
        page.get_by_role("alert").get_by_text("mask hides 0 of 64 patches").wait_for()
        drag(page, (0, 0), (0, 7))
        assert hidden(page).nonzero().flatten().tolist() == list(range(8))
        drag(page, (0, 6), (0, 7))
        painted = hidden(page)
        assert painted.nonzero().flatten().tolist() == list(range(6))
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        page.wait_for_function(OTHER_MASK, arg=bits(painted))
        assert hidden(page).nonzero().flatten().tolist() == [*range(6), 15]
        assert "row 2, column 8, hidden" in page.locator(".unseen").first.text_content()
        check_reconstruction(page)

        heat = pixels(page, "Attention")
        page.mouse.click(*centre(page, 1, (2, 5)))
        page.get_by_text("of row 3, column 6 through all blocks").wait_for()
        rolled = pixels(page, "Attention")
        assert not torch.equal(rolled, heat)
        page.get_by_label("Attention of").click()
        page.get_by_role("option", name="block 1").click()
        page.get_by_text("of row 3, column 6 in block 1").wait_for()
        assert not torch.equal(pixels(page, "Attention"), rolled)

        gallery = open_gallery(open_model(real_run))
        assert gallery is not None
        to_image(gallery.thumbnails[17]).save(tmp_path / "known.png")
        upload(page, tmp_path / "known.png")
        found = page.locator(".pictures:not(.examples) figure")
        number, label = int(gallery.features.samples[17]), int(gallery.features.labels[17])
        found.get_by_alt_text(f"training image {number}", exact=True).wait_for()
        assert found.count() == 8 and found.first.text_content().endswith(f" {label}")

        shown = pixels(page, "Original")
        for file, said in broken(tmp_path):
            page.locator("input[type=file]").set_input_files(file)
            page.get_by_role("alert").get_by_text(said).wait_for()
        assert torch.equal(pixels(page, "Original"), shown)
        page.get_by_role("button", name="Example: a portrait").click()
        page.wait_for_function("!document.querySelector('[role=alert]')")
        assert not torch.equal(pixels(page, "Original"), shown)
    assert complaints == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradio's own use of pandas
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_demo_page_fits_a_phone_in_light_and_dark(browser: Any, scheme: str, address: str) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme, "has_touch": True}
    with browser.new_context(**phone) as context:
        page, complaints = opened(context, address)
        before = hidden(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        field = page.locator(".patches").first  # tapped once it has stopped moving: pictures above may still be growing
        box = field.bounding_box()
        field.tap(position={"x": box["width"] * 4.5 / 8, "y": box["height"] * 4.5 / 8})
        page.wait_for_function(OTHER_MASK, arg=bits(before))
        assert (hidden(page) != before).nonzero().flatten().tolist() == [36]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 384) == (scheme == "dark")
    assert complaints == []
