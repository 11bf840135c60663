"""Pictures and sentences as HTML; all pixels lie in the page itself."""

from collections.abc import Iterable

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mae.demo.gallery import Neighbour
from mae.models.config import MAEConfig
from mae.pictures.draw import to_image
from mae.pictures.show import data_url

SMALL = 128  # pixels; images below are shown with sharp pixels


def img(image: Image.Image, alt: str) -> Markup:
    """Returns an <img> that holds the pixels without loss."""
    kind = "pixels" if max(image.size) < SMALL else "smooth"
    return Markup('<img class="{}" src="{}" alt="{}" draggable="false">').format(kind, data_url(image, "PNG"), alt)


def figure(image: Image.Image, title: str, note: str, alt: str | None = None) -> Markup:
    """Returns a picture above its title and a note; the title is its text for screen readers unless `alt` is given."""
    picture = img(image, title if alt is None else alt)
    return Markup("<figure>{}<figcaption><b>{}</b> {}</figcaption></figure>").format(picture, title, note)


def patch_picker(
    image: Image.Image,
    config: MAEConfig,
    title: str,
    note: str,
    *,
    mask: Tensor | None = None,
    chosen: int | None = None,
) -> Markup:
    """Returns a picture for patches.js: patches are painted (with a mask [N]) or chosen, with pointer or keys."""
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
        picture=img(image, title),
    )


def neighbour_row(found: Iterable[Neighbour]) -> Markup:
    """Returns neighbours with their similarity and class, nearest first."""
    figures = [
        figure(
            to_image(one.image),
            f"{one.similarity:.4f}",
            one.name,
            alt=f"training image {one.sample}",
        )
        for one in found
    ]
    return Markup('<div class="pictures">{}</div>').format(Markup("").join(figures))


def example_row(examples: Iterable[tuple[str, Image.Image]]) -> Markup:
    """Returns a button with a picture for each example."""
    buttons = [
        Markup('<button type="button" data-number="{}" title="{}">{}</button>').format(
            number, name, img(picture, f"Example: {name}")
        )
        for number, (name, picture) in enumerate(examples)
    ]
    return Markup('<div class="pictures examples">{}</div>').format(Markup("").join(buttons))


def sentence(text: str, kind: str = "note") -> Markup:
    """Returns a line of text; screen readers read kind "alert" at once."""
    if not text:
        return Markup("")
    role = Markup(' role="alert"') if kind == "alert" else ""
    return Markup('<p class="{}"{}>{}</p>').format(kind, role, text)
