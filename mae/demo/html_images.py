"""Pictures as HTML: everything that is shown lies in the page itself."""

import base64
import io
from collections.abc import Iterable

import torch
from einops import rearrange
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mae.demo.gallery import Neighbour
from mae.models.config import MAEConfig

SMALL = 128  # pixels; images below show their single pixels


def to_image(pixels: Tensor) -> Image.Image:
    """uint8, or in [0, 1]: [1, C, H, W] or [C, H, W] with one or three channels."""
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().byte()
    rows = rearrange(pixels[0] if pixels.ndim == 4 else pixels, "c h w -> h w c")
    return Image.fromarray(rows.expand(-1, -1, 3).contiguous().numpy())


def picture(image: Image.Image, alt: str) -> Markup:
    """An <img> with the pixels as they are."""
    file = io.BytesIO()
    image.save(file, "PNG")
    kind = "pixels" if max(image.size) < SMALL else "smooth"
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Markup('<img class="{}" src="{}" alt="{}" draggable="false">').format(kind, url, alt)


def figure(image: Image.Image, title: str, note: str = "") -> Markup:
    """A picture above its title and a note."""
    return Markup("<figure>{}<figcaption><b>{}</b> {}</figcaption></figure>").format(picture(image, title), title, note)


def patches(
    image: Image.Image,
    config: MAEConfig,
    title: str,
    note: str,
    *,
    mask: Tensor | None = None,
    chosen: int | None = None,
) -> Markup:
    """A picture whose patches are painted (with a mask [N]) or chosen, by patches.js, with pointer or keys."""
    rows, columns = config.grid
    keys = "Arrow keys move, the space bar " + ("chooses a patch." if mask is None else "hides or shows a patch.")
    return Markup(
        '<figure><div class="patches" tabindex="0" role="application" '
        'aria-label="{title}. {keys}" data-rows="{rows}" data-columns="{columns}" data-mask="{mask}" '
        'data-chosen="{chosen}">{picture}<canvas width="{columns}" height="{rows}"></canvas><i></i></div>'
        "<figcaption><b>{title}</b> {note}</figcaption></figure>"
    ).format(
        title=title,
        note=note,
        keys=keys,
        rows=rows,
        columns=columns,
        mask="" if mask is None else "".join(str(int(hidden)) for hidden in mask.tolist()),
        chosen="" if chosen is None else chosen,
        picture=picture(image, title),
    )


def neighbour_row(found: Iterable[Neighbour]) -> Markup:
    """Neighbours with their class and similarity, nearest first."""
    figures = [
        Markup("<figure>{}<figcaption><b>{:.4f}</b> {}</figcaption></figure>").format(
            picture(to_image(one.image), f"training image {one.sample}"),
            one.similarity,
            f"class {one.label}" if one.label >= 0 else f"image {one.sample}",
        )
        for one in found
    ]
    return Markup('<div class="pictures">{}</div>').format(Markup("").join(figures))


def example_row(examples: Iterable[tuple[str, Image.Image]]) -> Markup:
    """Buttons with pictures."""
    buttons = [
        Markup('<button type="button" data-number="{}" title="{}">{}</button>').format(
            number, name, picture(image, f"Example: {name}")
        )
        for number, (name, image) in enumerate(examples)
    ]
    return Markup('<div class="pictures examples">{}</div>').format(Markup("").join(buttons))


def sentence(text: str, kind: str = "note") -> Markup:
    """A line of text; kind "alert" is read out at once."""
    if not text:
        return Markup("")
    role = Markup(' role="alert"') if kind == "alert" else ""
    return Markup('<p class="{}"{}>{}</p>').format(kind, role, text)
