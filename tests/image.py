"""The image of the Dockerfile, built by buildah on a Debian made here, and containers with a process 1 of their own.

1 base       debootstrap makes a Debian in the place of the CUDA base, which lies in a registry
2 build      buildah runs the Dockerfile; its storage is in the given folder
3 Container  the image's root in namespaces of mounts and processes, for any user, with folders of the host

Not as with Docker or Kubernetes: the network, /dev and limits are those of the host, and there is no GPU.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAMS = ("buildah", "debootstrap")
ROOM = 30e9  # bytes: packages with CUDA take 7 GB, and as much again while the image is stored
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
CERTIFICATES = Path("/etc/ssl/certs")  # those of the host know its proxy

# Process 1 of the new namespaces: mounts, of which nothing is seen outside, then becomes the program. What it writes
# into the image goes to memory.
ENTER = """
set -e
layer=$1 lower=$2 read_only=$3 identity=$4 groups=$5
shift 5
mount -t tmpfs tmpfs "$layer"
mkdir "$layer/upper" "$layer/work" "$layer/root"
root=$layer/root
mount -t overlay -o "lowerdir=$lower,upperdir=$layer/upper,workdir=$layer/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for file in /etc/hosts /etc/resolv.conf; do
    touch "$root$file"
    mount --bind "$file" "$root$file"
done
while [ "$1" != -- ]; do
    mount --bind "$1" "$root/$2"
    shift 2
done
shift
if [ "$read_only" = yes ]; then
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    mount -t tmpfs -o mode=1777 tmpfs "$root/home/mae"
    mount -o remount,bind,ro "$root"
fi
exec chroot --userspec="$identity" --groups="$groups" "$root" "$@"
"""


class Image:
    """A built image, and the storage that holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def buildah(self, *words: str | Path) -> str:
        place = ["--root", self.folder / "storage", "--runroot", self.folder / "run"]
        done = subprocess.run(["buildah", *place, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout.strip()

    def build(self, **arguments: str) -> "Image":
        """Builds the base and the image; `arguments` are those of the Dockerfile."""
        debian = self.folder / "debian"
        words = ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, debian, MIRROR]
        subprocess.run(words, check=True, capture_output=True)
        container = self.buildah("from", "scratch")
        self.buildah("add", container, debian, "/")
        self.buildah("commit", "--rm", container, "localhost/base")
        shutil.rmtree(debian)
        bundle = CERTIFICATES / "ca-certificates.crt"
        arguments = {"BASE": "localhost/base", "PIP_ARGS": f"--cert {bundle}" if bundle.exists() else "", **arguments}
        given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        ways = ["--isolation", "chroot", "--network", "host", "--layers=false"]
        ways += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"] if bundle.exists() else []
        self.buildah("bud", *ways, *given, "-t", "localhost/mae", ROOT)
        return self.open()

    def open(self) -> "Image":
        """Mounts the root of the image, and reads its config: user, environment, working folder, entry point."""
        self.root = self.buildah("mount", self.buildah("from", "--pull-never", "localhost/mae"))
        self.config = json.loads(self.buildah("inspect", "--type", "image", "localhost/mae"))["OCIv1"]["config"]
        (self.folder / "layer").mkdir(exist_ok=True)
        return self

    def close(self) -> None:
        """Removes the image, its base and its containers."""
        self.buildah("rm", "--all")
        subprocess.run(["umount", self.folder / "storage" / "overlay"], capture_output=True)  # of that driver alone
        shutil.rmtree(self.folder)


class Container:
    """A program in the image, as process 1 of its namespaces.

    user    of the host and of the container, as --user: "1000:1000"; None: the image's own
    groups  further ones: fsGroup of Kubernetes
    mounts  folders of the host by their place in the image
    """

    def __init__(
        self,
        image: Image,
        words: Sequence[str],
        *,
        user: str | None = None,
        groups: str = "",
        mounts: dict[str, Path] | None = None,
        entrypoint: Sequence[str] | None = None,
        read_only: bool = False,
    ) -> None:
        config = image.config
        program = [*(config["Entrypoint"] if entrypoint is None else entrypoint), *words]
        folders = [str(word) for place, folder in (mounts or {}).items() for word in (folder, place)]
        inside = [
            "/usr/bin/env",
            "-i",
            f"--chdir={config['WorkingDir']}",
            *config["Env"],
            "OMP_NUM_THREADS=1",
            *program,
        ]
        options = ["yes" if read_only else "no", user or config["User"], groups]
        enter = [ENTER, "sh", f"{image.folder}/layer", image.root, *options, *folders]
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", *enter, "--", *inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop(self) -> None:
        """Sends SIGTERM to process 1, as `docker stop` and Kubernetes do."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)

    def finish(self, code: int = 0, seconds: float = 300) -> str:
        """Returns what the program has printed; it has to end with this exit code."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # and process 1 with it
            output, _ = self.process.communicate()
            pytest.fail(f"does not end\n{output}")
        assert self.process.returncode == code, output
        return output
