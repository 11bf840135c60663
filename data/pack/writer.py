"""Writes one shard of a pack: tar, index, read back, final names, record."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from webdataset.writer import TarWriter

from data.atomic import publish, replace_file
from data.errors import DataError
from data.images.arrays import channels_of
from data.images.decode import has_16_bits, image_size, verify
from data.images.pil import picture
from data.index import index_file
from data.index.build import build
from data.pack.plan import WORK, PackPlan
from data.pack.sample import Sample

Written = tuple[str, int, bytes]  # name, size and hash of a member of a tar as it was written, or read back
# Headers without machine, user and time, so that equal samples give equal bytes.
TAR = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "GNU_FORMAT", "encoder": False, "keep_meta": True}


class ShardJob(NamedTuple):
    """One shard to be written: everything that its process needs."""

    folder: Path
    plan: PackPlan
    tar: str  # path in the folder
    samples: list[Sample]
    part: str  # "1/8", "" without parts


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished shard, as recorded in .pack."""

    tar: str
    samples: int
    bytes: int
    sha256: str
    reencoded: int
    bad: list[dict[str, str]]  # file and reason of each image that does not decode
    plan: str  # its digest
    part: str


def find_record(folder: Path, tar: str, plan: str) -> Record | None:
    """Returns the record of a finished shard, None if it has yet to be written."""
    try:
        record = Record(**json.loads(_record_path(folder, tar).read_text()))
        size = os.path.getsize(folder / tar) if record.samples else 0
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if (record.plan, record.bytes) == (plan, size) else None


def write_shard(job: ShardJob, advance: Callable[[], None]) -> Record:
    """Writes a shard as .tar.tmp, reads it back through its index, and only then gives it its name and a record.

    A shard of which no image decodes has a record alone. `advance` is called after each sample.
    Raises DataError if what is read back is not what was written.
    """
    temporary = job.folder / f"{job.tar}.tmp"
    temporary.parent.mkdir(exist_ok=True)  # train, val or test
    with open(temporary, "wb") as file, TarWriter(file, **TAR) as writer:
        written, reencoded, bad = _write_members(writer, job, advance)
    size, sha256 = 0, ""
    if written:
        index = build(str(temporary))
        read_back(index, written)
        with open(temporary, "rb") as file:
            size, sha256 = index.tar_bytes, hashlib.file_digest(file, "sha256").hexdigest()
        final = str(job.folder / job.tar.removesuffix(".tar"))
        for path, ending in ((temporary, ".tar"), (index.text, ".idx"), (f"{index.text}.bin", ".idx.bin")):
            publish(path, final + ending)
    else:
        temporary.unlink()
    samples = len(job.samples) - len(bad)
    record = Record(job.tar, samples, size, sha256, reencoded, bad, job.plan.digest, job.part)
    with replace_file(_record_path(job.folder, job.tar), "w") as file:
        json.dump(dataclasses.asdict(record), file)
    return record


def _record_path(folder: Path, tar: str) -> Path:
    return folder / WORK / f"{Path(tar).stem}.json"


def _write_members(
    writer: TarWriter, job: ShardJob, advance: Callable[[], None]
) -> tuple[list[Written], int, list[dict[str, str]]]:
    """Writes the members. Returns them, the number of images that were encoded anew, and those that do not decode."""
    written, reencoded, bad = [], 0, []
    for sample in job.samples:
        try:
            members, anew = _read_members(sample, job)
        except (DataError, OSError) as error:
            bad.append({"file": sample.origin, "reason": str(error)})
        else:
            reencoded += anew
            for extension, data in members:
                # One call for each, because TarWriter would sort them: the image comes first.
                writer.write({"__key__": sample.key, extension: data})
                written.append((f"{sample.key}.{extension}", len(data), digest_of(data)))
        advance()
    return written, reencoded, bad


def _read_members(sample: Sample, job: ShardJob) -> tuple[list[tuple[str, bytes]], bool]:
    """Returns (extension, contents) of the files of a sample, and whether its image was encoded anew."""
    data, extension = sample.read(), sample.extension
    shorter_side, quality = job.plan.shorter_side, job.plan.quality
    smaller = shrink(data, shorter_side, quality) if shorter_side and quality else None
    if smaller is None:
        verify(data)
    elif extension.rpartition(".")[2].lower() not in ("jpg", "jpeg"):
        extension = extension.rpartition(".")[0] + ".jpg" if "." in extension else "jpg"
    others = [] if sample.label is None else [("cls", str(sample.label).encode())]
    others += [(name, read()) for name, read in sample.others]
    if extension in [name.lower() for name, _ in others]:
        raise DataError(f"its image would become {sample.key}.{extension}, which is there already")
    return [(extension, data if smaller is None else smaller), *others], smaller is not None


def read_back(index: index_file.IndexFile, written: list[Written]) -> None:
    """Reads a tar through its index. Raises DataError if that is not exactly what was written."""
    listed, samples = [], 0
    with open(index.tar, "rb") as tar, open(index.text, "rb") as text:
        next(text)
        for line in text:
            members = list(index_file.parse_members(line.decode("utf-8", "surrogateescape").rstrip("\n")))
            samples += 1
            for member in members:
                tar.seek(member.offset)
                data = tar.read(member.size)
                listed.append((member.name, len(data), digest_of(data)))
    if listed != written:
        wrong = next((a[0] for a, b in zip(listed, written, strict=False) if a != b), "the number of members")
        raise DataError(
            f"{index.tar} does not hold what was written to it ({wrong} differs). Check the disk, and that no other "
            "pack writes to the same folder; then repeat the command."
        )
    assert index.samples == samples


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


# Shrinking by halves inside the JPEG decoder saves up to two thirds of the time. With 1.5 times the wanted size left,
# the result is closer to the full decode (40 dB at worst, eight photographs) than JPEG of quality 90 is (34 to 40 dB).
HEADROOM = 1.5


def shrink(data: bytes, shorter_side: int, quality: int) -> bytes | None:
    """Returns a JPEG of the upright image with this shorter side (Lanczos), None if it is no larger than that.

    Grey stays grey, an alpha channel is dropped, a colour profile is kept.
    Raises DataError if the image cannot be decoded, or has 16 bits or channels that a JPEG cannot hold.
    """
    height, width = image_size(data)
    if min(height, width) <= shorter_side:
        return None
    if channels_of(data) or has_16_bits(data):
        raise DataError(
            "a JPEG, as --shorter-side writes it, has 8 bits and no other channels than grey or RGB: pack it without "
            "--shorter-side"
        )
    factor = shorter_side / min(height, width)
    size = (max(shorter_side, round(width * factor)), max(shorter_side, round(height * factor)))
    image = picture(data, at_least=(int(size[0] * HEADROOM), int(size[1] * HEADROOM)))
    profile = image.info.get("icc_profile")
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, icc_profile=profile)
    return buffer.getvalue()
