"""Put what was selected and tagged in the page into folders: `c2bin-explore apply FILE`.

  c2bin-explore apply selection.csv                  copies into selection/TAG or selection/CLUSTER
  c2bin-explore apply assignments.csv --folder photos --by 30 --link

FILE is an export of the page (CSV or JSON) or an assignments.csv. Nothing is overwritten, and
without --move nothing is moved or deleted: files that are there already stay, and the same command
goes on after an interruption.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tqdm import tqdm

from c2bin_explore.analysis import read_csv
from c2bin_explore.images import ExploreError, parsed, shown

# What some file system takes for something else than a name.
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]|^\.+|[. ]+$')


def path(text: str) -> Path:
    """Return a path of the command line, which must not be an unset variable's."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty text (an unset variable?)")
    return Path(text)


def parser_of(doc: str | None, prog: str) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring: its first paragraph, and the rest below."""
    description, _, epilog = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(arguments: Sequence[str]) -> int:
    """Run `c2bin-explore apply`; return its exit status."""
    parser = parser_of(__doc__, "c2bin-explore apply")
    add = parser.add_argument
    add("file", type=path, metavar="FILE", help="export of the page, or assignments.csv")
    add("--folder", type=path, metavar="DIR", help="of the images (default: the one in FILE)")
    add("--to", type=path, metavar="DIR", help="where to put them (default: FILE's name)")
    add(
        "--by",
        metavar="WHAT",
        help="tags, a number of clusters, or another column of FILE (default: tags if there are "
        "any, else the coarsest clusters)",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--link", action="store_true", help="link to the images instead of copying")
    way.add_argument("--move", action="store_true", help="move the images instead of copying")
    args = parser.parse_args(arguments)
    rows = _rows(args.file)
    plan = _plan(rows, args)
    done, there, wrong = 0, 0, list[str]()
    for source, target in tqdm(plan, unit="file"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if (args.move and target.exists() and not source.exists()) or (
                target.exists() and filecmp.cmp(source, target, shallow=False)
            ):
                there += 1
            else:
                _put(source, target, args)
                done += 1
        except OSError as error:
            wrong.append(f"{shown(str(source))}: {error.strerror or error}")
    said = "linked" if args.link else "moved" if args.move else "copied"
    print(f"{done:,} files {said}, {there:,} were there already, in {shown(str(_target(args)))}")
    for line in wrong:
        print(f"c2bin-explore: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _target(args: argparse.Namespace) -> Path:
    to: Path = args.to or Path(args.file.stem)
    return to


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of an export."""
    try:
        if file.suffix.lower() == ".json":
            rows = json.loads(file.read_text(encoding="utf-8"))
        else:
            rows = read_csv(file)
        if not rows or not all("file" in row for row in rows):
            raise ValueError("no column file")
    except (TypeError, ValueError) as error:
        raise ExploreError(
            f"{shown(str(file))}: expected a CSV or JSON export of the page, or assignments.csv, "
            f"with a column file and a row or more ({error})"
        ) from error
    return list(rows)


def _groups(row: dict[str, Any], by: str) -> list[str]:
    """Return the names of the folders that an image goes to."""
    if by == "tags":
        tags = row.get("tags") or []
        names = tags if isinstance(tags, list) else tags.split(";")
    elif by.isdigit():
        names = [row.get(f"name_{by}") or f"cluster {row[f'cluster_{by}']}"]
    else:
        names = [row[by] or f"no {by}"]
    return [_UNSAFE.sub("_", str(name).strip()) or "_" for name in names if str(name).strip()]


def _plan(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Return what goes where, checked before anything is done."""
    scales = [name.removeprefix("cluster_") for name in rows[0] if name.startswith("cluster_")]
    by = args.by or ("tags" if any(row.get("tags") for row in rows) else (scales or ["label"])[0])
    if by != "tags" and by not in rows[0] and by not in scales:
        raise ExploreError(
            f"--by: expected tags, {', '.join([*scales, *rows[0]])}, got {shown(by)}"
        )
    plan, taken = list[tuple[Path, Path]](), set[Path]()
    for row in rows:
        folder = args.folder or _folder(row, args.file)
        relative = parsed(str(row["file"]))
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise ExploreError(f"{shown(relative)} is not in the folder of the images")
        source, groups = folder / relative, _groups(row, by)
        if args.move and len(groups) > 1:
            raise ExploreError(
                f"--move: {shown(relative)} has {len(groups)} tags, and can be in one folder only: "
                "copy or link it"
            )
        for group in groups:
            name = PurePosixPath(source.name)
            target = _target(args) / group / name
            number = 1
            while target in taken:  # of another subfolder
                number += 1
                target = target.with_name(f"{name.stem} ({number}){name.suffix}")
            taken.add(target)
            plan.append((source, target))
    gone = [source for source, target in plan if not source.exists() and not target.exists()]
    if gone:
        raise ExploreError(
            f"{len(gone):,} of {len(plan):,} files are not there, such as {shown(str(gone[0]))}: "
            "--folder DIR says where the images are now"
        )
    return plan


def _folder(row: dict[str, Any], file: Path) -> Path:
    parts = urlsplit(str(row.get("folder") or ""))
    if parts.scheme != "file":
        raise ExploreError(
            f"{shown(str(file))} does not say where the images are: --folder DIR does"
        )
    return Path(url2pathname(parts.path))


def _put(source: Path, target: Path, args: argparse.Namespace) -> None:
    """Copy, link or move a file to where there is none."""
    if args.link:
        target.symlink_to(source.resolve())
        return
    # "x" fails if anything has come to be there since.
    with source.open("rb") as content, target.open("xb") as copy:
        try:
            shutil.copyfileobj(content, copy)
        except BaseException:
            target.unlink()
            raise
    shutil.copystat(source, target)
    if args.move:
        source.unlink()
