"""Packs images into shuffled shards with an index and a manifest.

    python -m data.pack SOURCE OUT
    python -m data.pack SOURCE OUT --val 0.05       makes OUT/train and OUT/val

SOURCE is a folder of images (flat, or with one sub-folder per class), existing tars (a tar, a folder of tars, a glob
in quotes), or a CSV list with the header path[,label]. Files named after an image are kept with it; with --masks
instances.json each image gets a record of its objects in SA-1B's format; with --label-maps FOLDER its map of classes.

The part of an image follows from a hash of its key: adding images moves no other. --group-by folder, or a column of the
list (patient, scene, video), keeps images that belong together in one part.

Classes are numbered in alphabetical order. Where another part may lack some, give it the numbers of the first:

    python -m data.pack IMAGES/val OUT/val --classes OUT/train

The bytes of the images are kept as they are, unless --shorter-side asks for smaller ones.

Repeat the command to resume an interrupted pack. Several machines share the work with --part 1/8 … --part 8/8, in any
order, and the same command with --merge at the end:

    python -m data.pack SOURCE OUT --part $SLURM_ARRAY_TASK_ID/8      (sbatch --array=1-8)
    python -m data.pack SOURCE OUT --merge
"""

import argparse
import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from data.errors import DataError, command
from data.index.passed_over import PassedOver, printable
from data.index.samples import normalise_extension
from data.index.splits import NAMES, local_path
from data.pack.assemble import assemble
from data.pack.class_list import read_class_list
from data.pack.coco import with_masks
from data.pack.divide import FOLDER, count_splits, divide, wanted
from data.pack.label_maps import MEMBERS, with_maps
from data.pack.pack import MAX_BAD, QUALITY, SHARD_SIZE, Part, write_shards
from data.pack.plan import (
    DIVISION,
    SETTINGS,
    PackPlan,
    check_out,
    find_difference,
    hash_keys,
    hold,
    load_plan,
    partial_folder,
    replaced_folder,
)
from data.pack.sources import open_source
from data.parallel import cores
from data.storage.credentials import hide

KINDS = tuple(MEMBERS)  # of maps: label, depth


def main(words: list[str] | None = None) -> None:
    arguments = _parser().parse_args(words)
    out, part, max_bad = _real_folder(arguments.out), arguments.part, arguments.max_bad
    settings = _settings(arguments)
    given = read_class_list(arguments.classes) if arguments.classes else None
    check_out(out, arguments.overwrite)
    if arguments.merge:
        plan = _plan_to_merge(out, settings if given is None else settings | {"classes": given})
        with hold(out):
            check_out(out, arguments.overwrite)
            manifests = assemble(plan, out, max_bad=max_bad, verify=True, jobs=arguments.jobs)
        _report(out, manifests)
        return
    passed_over = PassedOver()
    ours = (out, partial_folder(out), replaced_folder(out))
    path = local_path(hide(arguments.source))
    if arguments.group_by not in (None, FOLDER) and not path.lower().endswith(".csv"):
        raise DataError(
            f"--group-by {arguments.group_by} names a column, and {path} is no CSV list. Use --group-by folder, or "
            "write a list with the header path,label and that column."
        )
    source = open_source(path, given, arguments.image, passed_over, ours, arguments.group_by)
    if arguments.masks:
        source = with_masks(source, arguments.masks, passed_over)
    for kind in KINDS:
        if folder := getattr(arguments, f"{kind}_maps"):
            source, maps = with_maps(source, kind, folder, getattr(arguments, f"{kind}_name"), passed_over)
            settings[f"{kind}_maps"] = list(maps)
    samples, classes, note, naming = source
    if naming.stated and arguments.label_maps is None:  # of the tars that are packed anew
        settings |= {"label_maps": [naming.extension, ""], "label_classes": naming.names, "void": naming.void}
    plan = PackPlan(samples=len(samples), classes=classes, keys=hash_keys(samples), **settings)
    split_of = None
    if wanted(plan):
        split_of, remark = divide(samples, plan)
        plan = dataclasses.replace(plan, splits=count_splits(split_of, plan))
        note = "; ".join(filter(None, (note, remark)))
    if note:
        print(note, file=sys.stderr)
    if arguments.strict:
        passed_over.refuse()
    if passed_over:
        print(f"passed over: {passed_over}", file=sys.stderr)
    with hold(out, part):
        write_shards(plan, samples, out, part, arguments.jobs, max_bad, arguments.overwrite, passed_over, split_of)
        manifests = {} if part else assemble(plan, out, max_bad=max_bad)
    if not part:
        _report(out, manifests)
        return
    print(
        f"{printable(str(partial_folder(out)))}: part {part[0]}/{part[1]} of {len(plan.shards)} shards is finished. "
        "When all parts are, repeat the command with --merge in place of --part."
    )


def _real_folder(out: Path) -> Path:
    """Returns OUT, or the folder that it leads to if it is a link, `.` or `..`: OUT.partial lies beside that."""
    return out.resolve() if out.is_symlink() or out.name in ("", "..") else out


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of the PackPlan that options set. Raises DataError if options contradict each other."""
    out = Path(os.path.abspath(arguments.out))
    is_split = out.name.lower() in NAMES  # imagenet/train gives imagenet-train
    name = arguments.name or (f"{out.parent.name}-{out.name}" if is_split and out.parent.name else out.name)
    if "/" in name:
        raise DataError(f"--name {name} contains a slash, and file names in OUT begin with it. Leave out the slash.")
    if arguments.quality and not arguments.shorter_side:
        raise DataError(
            f"--quality {arguments.quality} has no effect without --shorter-side: images are kept as they are. "
            "Leave it out, or add --shorter-side."
        )
    if arguments.masks and arguments.shorter_side:
        raise DataError("--masks fit images as they are, not resized: leave out --shorter-side, or resize both before.")
    _refuse_division(arguments, is_split)
    quality = (arguments.quality or QUALITY) if arguments.shorter_side else None
    settings = {field: getattr(arguments, field) for field in SETTINGS} | {"name": name, "quality": quality}
    settings |= {"annotations": _digest(arguments.masks)} if arguments.masks else {}
    return settings | _map_settings(arguments)


def _map_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of the PackPlan that say what label maps mean. Raises DataError if there are no maps."""
    names = ("label_classes", "void", "label_name"), ("depth_name",)
    for kind, belonging in zip(KINDS, names, strict=True):
        given = [name for name in belonging if getattr(arguments, name) is not None]
        if given and getattr(arguments, f"{kind}_maps") is None:
            option = f"--{given[0].replace('_', '-')}"
            raise DataError(f"{option} {getattr(arguments, given[0])} says what --{kind}-maps are: add those.")
        if getattr(arguments, f"{kind}_maps") and arguments.shorter_side:
            raise DataError(
                f"--{kind}-maps fit images as they are, not resized: leave out --shorter-side, or resize both before."
            )
    listed = arguments.label_classes and read_class_list(arguments.label_classes, "--label-classes")
    return {"label_classes": listed or [], "void": arguments.void}


def _digest(masks: Path) -> str:
    try:
        with open(masks, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"--masks {masks} cannot be read ({error.strerror}). Check the path.") from None


def _refuse_division(arguments: argparse.Namespace, out_is_split: bool) -> None:
    """Raises DataError if the options that divide a source contradict each other or OUT."""
    val, test, per_class, group_by = (getattr(arguments, name) for name in DIVISION)
    if (val or 0) + (test or 0) >= 1:
        raise DataError(f"--val {val} and --test {test} leave nothing for training. Use shares of less than 1 in all.")
    if group_by and per_class:
        raise DataError(
            f"--val-per-class {per_class} counts images, and --group-by {group_by} keeps groups whole. Use --val with "
            "a share."
        )
    if group_by and not (val or test):
        raise DataError(f"--group-by {group_by} has no effect without --val or --test. Add one, or leave it out.")
    if out_is_split and (val or test or per_class):
        raise DataError(
            f"OUT {arguments.out} is called after a part, and would hold the parts train and val. Give "
            f"{arguments.out.parent}, or leave out --val and --test."
        )


def _plan_to_merge(out: Path, settings: dict[str, Any]) -> PackPlan:
    """Returns the plan of the parts. Raises DataError if there is none, or if it has other settings."""
    folder = partial_folder(out)
    plan = load_plan(folder)
    if plan is None:
        raise DataError(
            f"{folder} holds no unfinished pack. Pack its parts first: --part 1/2, --part 2/2, for example."
        )
    if reason := find_difference(plan, dataclasses.replace(plan, **settings)):
        raise DataError(f"{folder} was packed with {reason}. Give --merge the settings that its parts had.")
    return plan


def _report(out: Path, manifests: dict[str, dict[str, Any]]) -> None:
    for split, manifest in manifests.items():
        facts = [f"{printable(str(out / split))}: {manifest['samples']} samples in {len(manifest['shards'])} shards"]
        if manifest["classes"]:
            facts.append(f"{len(manifest['classes'])} classes")
        if manifest["shorter_side"]:
            facts.append(f"{manifest['reencoded']} encoded anew with a shorter side of {manifest['shorter_side']}")
        if manifest["bad"]:
            facts.append(f"{len(manifest['bad'])} unreadable left out (bad_files.txt)")
        print(", ".join(facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="folder of images, tar, folder of tars, glob of tars in quotes, or .csv")
    add("out", type=Path, help="folder to be created; end it in /train, /val or /test to pack a part of a data set")
    val = parser.add_mutually_exclusive_group()
    val.add_argument(
        "--val", type=_share, metavar="SHARE", help="of the images for OUT/val, such as 0.05; by their keys"
    )
    val.add_argument("--val-per-class", type=_positive, metavar="N", help="images of each class for OUT/val")
    add("--test", type=_share, metavar="SHARE", help="of the images for OUT/test, none of them in OUT/val")
    add("--group-by", metavar="WHAT", help="folder, or a column of the list: what it names stays in one part")
    add("--name", help="of the shards: NAME-000000.tar (default: the name of OUT)")
    add("--seed", type=int, default=0, help="of the order of the samples (default 0)")
    add("--shard-size", type=_positive, default=SHARD_SIZE, metavar="N", help=f"samples per shard ({SHARD_SIZE})")
    add("--shorter-side", type=_positive, metavar="PIXELS", help="encode anew, upright, images with a larger one")
    add("--quality", type=_quality, metavar="Q", help=f"of the JPEGs that --shorter-side makes (default {QUALITY})")
    add(
        "--classes",
        metavar="FROM",
        help="number the classes as FROM does: a packed part, or a file with a name per line",
    )
    add(
        "--image",
        type=normalise_extension,
        metavar="EXT",
        help="the image of samples of tars with several: png, left.jpg; first: any",
    )
    add("--masks", type=Path, metavar="JSON", help="COCO instances of the images, kept as KEY.json as SA-1B does")
    add("--label-maps", type=Path, metavar="FOLDER", help="a map of classes for each image, by its path: KEY.seg.png")
    add("--label-name", metavar="OLD=NEW", help="text in the paths of images, and what those of their maps have there")
    add("--label-classes", metavar="FILE", help="names of the classes of the maps, one per line, into manifest.json")
    add("--void", type=int, metavar="N", help="number of no class in the maps, into manifest.json")
    add("--depth-maps", type=Path, metavar="FOLDER", help="a map of depths for each image: KEY.depth.png, .npy")
    add("--depth-name", metavar="OLD=NEW", help="as --label-name, of depth maps")
    add("--jobs", type=_positive, default=cores(), metavar="N", help=f"processes (default: the cores, here {cores()})")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--part", type=_part, metavar="I/N", help="write only each N-th shard, from the I-th of 1 … N on")
    one.add_argument("--merge", action="store_true", help="check and join what the parts wrote; SOURCE is not read")
    strict = "refuse a source of which anything would be passed over (remarks stay remarks; unreadable: --max-bad 0)"
    add("--strict", action="store_true", help=strict)
    add("--max-bad", type=int, default=MAX_BAD, metavar="N", help=f"unreadable images to skip (default {MAX_BAD})")
    add(
        "--overwrite", action="store_true", help="replace OUT once the new one is complete; give up another OUT.partial"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _share(text: str) -> float:
    if not 0 < (share := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1, such as 0.05")
    return share


def _quality(text: str) -> int:
    if not 1 <= int(text) <= 95:
        raise argparse.ArgumentTypeError(f"{text} is not a JPEG quality of 1 … 95")
    return int(text)


def _part(text: str) -> Part:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N, such as 1/8")
    return int(first), int(count)


if __name__ == "__main__":
    command(main)
