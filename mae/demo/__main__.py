"""python -m mae.demo runs/NAME [--host ADDRESS] [--port NUMBER] [--root-path PREFIX] [model.NAME=VALUE …]"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mae.errors import CheckpointError, ConfigError
from mae.formats.given import model_settings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mae.demo",
        description="Show on a page of this machine what a model makes of photographs: reconstruction, attention and "
        "nearest neighbours of an autoencoder, masks for clicks and boxes of a SAM.",
    )
    what = "run folder, checkpoint, .pth, Hugging Face or timm folder, of an autoencoder or a whole SAM"
    parser.add_argument("model", type=Path, help=what)
    parser.add_argument("settings", nargs="*", metavar="model.NAME=VALUE", help="what a file cannot say: num_heads, …")
    parser.add_argument(
        "--weights", choices=("raw", "average"), help="of a run with task.ema (default: those that it validated)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s; 0: any that is free")
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PREFIX",
        help="of the page's address behind a proxy: /user/NAME/proxy/7860, or a whole address with https://",
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        given = model_settings(arguments.settings)
        show(arguments.model, arguments.weights, arguments.host, arguments.port, arguments.root_path, given)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(path: Path, weights: Any, host: str, port: int, root_path: str, given: dict[str, Any]) -> None:
    """Opens the model and serves the page until it is interrupted. Raises ConfigError if gradio is not installed."""
    if find_spec("gradio") is None:
        raise ConfigError("the page needs the package gradio: pip install -e '.[demo]'")
    with private_uploads():
        from mae.demo.gallery import open_gallery
        from mae.demo.model import open_model
        from mae.demo.page import Page
        from mae.demo.sam_model import open_sam
        from mae.demo.sam_page import SamPage
        from mae.demo.serve import Proxy, listen, serve
        from mae.demo.views import Views, load_examples
        from mae.formats.opened import open_weights

        proxy = Proxy.behind(root_path)
        with listen(host, port) as at:
            opened = open_weights(path, weights=weights)
            if opened.kind == "mae":
                model = open_model(path, opened=opened, **given)
                page = Page(Views(model, open_gallery(model), load_examples(model)))
            else:
                page = SamPage(open_sam(path, opened, **given))
            address, port = at.getsockname()[:2]
            if proxy.origin:
                print(f"{proxy.origin}{proxy.prefix}/ by the proxy, which has to reach", flush=True)
            print(f"http://{f'[{address}]' if ':' in address else address}:{port} (Ctrl-C ends it)", flush=True)
            if not ip_address(address).is_loopback:
                print("everybody who reaches this machine can use the page", flush=True)
            serve(page.blocks, at, host, proxy)


@contextmanager
def private_uploads() -> Iterator[None]:
    """Keeps uploads to pages made inside this context in a temporary folder, removed at its end.

    Gradio makes further files where this points when it is imported, so that it has to be imported inside.
    """
    with TemporaryDirectory(prefix="mae-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield
        del os.environ["GRADIO_TEMP_DIR"]


if __name__ == "__main__":
    sys.exit(main())
