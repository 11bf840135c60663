"""python -m mae.demo on a segmentation run: clicks, boxes and corrections on a photograph."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae.demo.__main__ import main, private_uploads
from mae.demo.photo import fit_to_frame
from mae.demo.sam_model import SHOWN, DemoSam, Marks, open_sam
from mae.formats.opened import open_weights
from mae.sam.segmenter import BACKGROUND, FOREGROUND
from tests.masked_photos import shards_of_shapes
from tests.processes import finish, start
from tests.test_demo import CAT, broken, opened, saved, sixteen_bits, turned
from tests.test_segment import trained

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def segment_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = shards_of_shapes(tmp_path_factory.mktemp("shapes"))
    return trained(tmp_path_factory.mktemp("runs"), shards, "name=sam", "max_steps=1", "val_every=null")


@pytest.fixture(scope="module")
def sam(segment_run: Path) -> DemoSam:
    return open_sam(segment_run, open_weights(segment_run))


@pytest.fixture
def encoded(sam: DemoSam) -> Iterator[list[int]]:
    """Yields a list that grows with each pass of the encoder."""
    passes: list[int] = []
    handle = sam.model.encoder.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def test_photograph_fills_the_longer_side_of_the_frame_and_leaves_the_rest_black() -> None:
    for size, inside in (((451, 300), (43, 64)), ((300, 451), (64, 43)), ((4, 2000), (64, 1)), ((7, 7), (64, 64))):
        frame, found = fit_to_frame(Image.new("RGB", size, "white"), 64)
        assert frame.shape == (1, 3, 64, 64) and found == inside
        assert (frame[:, :, : inside[0], : inside[1]] == 255).all() and frame.sum() == 255 * 3 * inside[0] * inside[1]


def test_marks_are_answered_without_a_further_pass_of_the_encoder(sam: DemoSam, encoded: list[int]) -> None:
    embedded = sam.embed(CAT)
    assert embedded.picture.shape == (300, 451, 3) and embedded.inside == (43, 64)
    first = sam.answer(embedded, Marks(points=((200.0, 150.0, FOREGROUND),)))
    assert len(first.scores) == 3 and list(first.scores) == sorted(first.scores, reverse=True)
    assert sam.masks(embedded, first).shape == (3, 300, 451)
    more = first.marks._replace(points=(*first.marks.points, (20.0, 20.0, BACKGROUND)))
    corrected = [sam.answer(embedded, more, first._replace(chosen=chosen)) for chosen in (0, 2)]
    assert [len(one.scores) for one in corrected] == [1, 1]
    assert not torch.equal(corrected[0].logits, corrected[1].logits)  # the chosen mask is a prompt
    boxed = sam.answer(embedded, Marks(box=(50.0, 40.0, 300.0, 250.0)))
    both = sam.answer(embedded, boxed.marks._replace(points=more.points[1:]))
    assert not torch.equal(boxed.logits, first.logits) and not torch.equal(boxed.logits, both.logits)
    assert encoded == [1]


def test_large_and_unusual_photographs_are_shown_in_a_size_for_the_screen(sam: DemoSam) -> None:
    large = sam.embed(CAT.resize((4510, 3000)))
    assert large.picture.shape == (round(SHOWN * 3000 / 4510), SHOWN, 3)
    alpha = CAT.copy()
    alpha.putalpha(128)
    for other in (CAT.convert("CMYK"), CAT.convert("P"), alpha, sixteen_bits(CAT), CAT.convert("L")):
        assert sam.embed(other).picture.shape == (300, 451, 3)


def test_model_without_mask_input_and_three_masks_is_asked_as_it_was_trained(sam: DemoSam) -> None:
    plain = replace(sam, mask_input=False, multimask=False)
    embedded, marks = plain.embed(CAT), Marks(points=((200.0, 150.0, FOREGROUND),))
    first = plain.answer(embedded, marks)
    assert len(first.scores) == 1 and torch.equal(plain.answer(embedded, marks, first).logits, first.logits)
    assert not torch.equal(replace(plain, mask_input=True).answer(embedded, marks, first).logits, first.logits)


@pytest.mark.slow
def test_demo_command_serves_the_page_of_a_sam(segment_run: Path, tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx", reason="comes with gradio")
    process = start([sys.executable, "-m", "mae.demo", str(segment_run), "--port", "0"], TMPDIR=str(tmp_path))
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    shown = httpx.get(f"{url}/config", trust_env=False).text
    assert "A click marks" in shown and "Mask ratio" not in shown and "SAM of 2 blocks of width 48" in shown
    process.terminate()
    finish(process)


def test_demo_command_refuses_half_a_sam_and_settings_of_a_run(
    segment_run: Path, sam: DemoSam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    torch.save(sam.model.encoder.state_dict(), tmp_path / "encoder.pth")
    assert main([str(tmp_path / "encoder.pth"), "--port", "0"]) == 2
    assert "holds a SAM-style encoder without a prompt encoder and a mask decoder" in capsys.readouterr().err
    assert main([str(segment_run), "--port", "0", "model.num_heads=3"]) == 2
    assert "leave out num_heads" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address(sam: DemoSam) -> Iterator[str]:
    """Serves the page of the run and yields its address."""
    pytest.importorskip("gradio", reason="needs pip install -e '.[demo]'")
    from mae.demo.sam_page import SamPage
    from mae.demo.serve import build_server, listen

    with listen("127.0.0.1", 0) as at, private_uploads():
        answering = build_server(SamPage(sam).blocks)
        thread = threading.Thread(target=answering.run, kwargs={"sockets": [at]})
        thread.start()
        while not answering.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        answering.should_exit = True
        thread.join()


def at(page: Any, x: float, y: float) -> tuple[float, float]:
    """Returns where a share of width and height of the photograph is in the window."""
    field = page.locator(".prompts")
    field.scroll_into_view_if_needed()
    box = field.bounding_box()
    return box["x"] + box["width"] * x, box["y"] + box["height"] * y


def marks(page: Any, objects: int, background: int, boxes: int, masks: int) -> None:
    """Waits until so many marks are drawn, answered by so many masks."""
    page.wait_for_function(
        """([objects, background, boxes, masks]) => {
          const count = (which) => document.querySelectorAll(which).length;
          return count("circle.object") === objects && count("circle.background") === background
            && count(".prompts rect") === boxes && count(".masks button") === masks;
        }""",
        arg=[objects, background, boxes, masks],
    )


def chosen(page: Any) -> list[str]:
    return [button.get_attribute("aria-pressed") for button in page.locator(".masks button").all()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradio's own use of pandas
def test_sam_page_answers_clicks_boxes_choices_and_corrections(
    browser: Any, address: str, sam: DemoSam, encoded: list[int], tmp_path: Path
) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        page, complaints = opened(context, address, pictures=1)
        page.get_by_text("Nothing is marked.").wait_for()
        page.get_by_role("button", name="Example: a cat").click()
        page.wait_for_function("document.querySelector('.prompts img').naturalWidth === 451")
        assert encoded == [1]

        page.mouse.click(*at(page, 0.5, 0.4))
        marks(page, 1, 0, 0, masks=3)
        place = 0.5 * 451 - 0.5, 0.4 * 300 - 0.5, FOREGROUND
        embedded = sam.embed(CAT)
        expected = sam.answer(embedded, Marks(points=(place,)))
        share = sam.masks(embedded, expected)[0].mean()
        encoded.pop()
        said = page.get_by_text("Predicted IoU").text_content()
        score, percent = map(float, re.findall(r"-?\d+\.\d+", said))
        assert score == pytest.approx(expected.scores[0], abs=0.02) and percent == pytest.approx(100 * share, abs=3)
        assert chosen(page) == ["true", "false", "false"]

        page.locator(".masks button").nth(1).click()
        page.wait_for_function("document.querySelectorAll('.masks button')[1].ariaPressed === 'true'")
        page.keyboard.down("Shift")
        page.mouse.click(*at(page, 0.1, 0.1))
        page.keyboard.up("Shift")
        marks(page, 1, 1, 0, masks=1)
        page.get_by_role("button", name="Undo").click()
        marks(page, 1, 0, 0, masks=3)
        assert chosen(page) == ["false", "true", "false"]

        page.get_by_role("radio", name="Background").check()
        page.mouse.click(*at(page, 0.9, 0.9))
        page.mouse.click(*at(page, 0.9, 0.1), button="right")
        marks(page, 2, 1, 0, masks=1)
        page.get_by_role("button", name="Clear").click()
        marks(page, 0, 0, 0, masks=0)
        page.get_by_text("Nothing is marked.").wait_for()

        page.mouse.move(*at(page, 0.6, 0.7))
        page.mouse.down()
        page.mouse.move(*at(page, 0.2, 0.3), steps=4)
        assert page.locator(".prompts .band").is_visible()
        page.mouse.up()
        marks(page, 0, 0, 1, masks=3)
        drawn = page.locator(".prompts rect")
        edges = [float(drawn.get_attribute(name)) for name in ("x", "y", "width", "height")]
        assert edges == pytest.approx([0.2 * 451, 0.3 * 300, 0.4 * 451, 0.4 * 300], abs=2)
        page.locator(".prompts").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")
        marks(page, 0, 1, 1, masks=1)
        assert "22 % from the left, 30 % from the top" in page.locator(".unseen").first.text_content()
        page.keyboard.press("b")
        for _ in range(5):
            page.keyboard.press("Shift+ArrowDown")
            page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("b")
        page.wait_for_function("Math.abs(document.querySelector('.prompts rect').height.baseVal.value - 150) < 2")
        assert encoded == [1]

        before = page.locator(".prompts img").get_attribute("src")
        page.locator("input[type=file]").set_input_files(turned(tmp_path / "cat.jpg"))
        page.wait_for_function("before => document.querySelector('.prompts img').src !== before", arg=before)
        marks(page, 0, 0, 0, masks=0)
        assert encoded == [1, 1]
        for file, reason in broken(tmp_path)[:3]:
            page.locator("input[type=file]").set_input_files(file)
            page.get_by_role("alert").get_by_text(reason).wait_for()
        assert encoded == [1, 1]
        page.locator("input[type=file]").set_input_files(saved(CAT.resize((1200, 800)), tmp_path / "large.png"))
        page.wait_for_function("document.querySelector('.prompts img').naturalWidth === 1024")
        page.wait_for_function("!document.querySelector('[role=alert]')")
    assert complaints == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradio's own use of pandas
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sam_page_fits_a_phone_in_light_and_dark(browser: Any, scheme: str, address: str) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme, "has_touch": True}
    with browser.new_context(**phone) as context:
        page, complaints = opened(context, address, pictures=1)
        field = page.locator(".prompts")
        box = field.bounding_box()
        field.tap(position={"x": box["width"] / 2, "y": box["height"] / 2})
        marks(page, 1, 0, 0, masks=3)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert np.mean([int(one) for one in re.findall(r"\d+", ground)[:3]]) < 128 or scheme == "light"
    assert complaints == []
