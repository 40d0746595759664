"""Train C2BIN on a folder of images and look at its clusters and neighbours in one HTML page.

  c2bin-explore FOLDER                               or: python -m c2bin_explore FOLDER
  c2bin-explore NEW --checkpoint OUT/model.ckpt      other images, no training

FOLDER may hold images of any size and format that Pillow reads, in subfolders too; they need no
labels. Ctrl-C at any time: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from c2bin_explore import analysis, training
from c2bin_explore import images as files
from c2bin_explore import page as pages
from c2bin_explore.images import ExploreError, shown
from c2bin_ext._hosts import whole_file

__all__ = ["main"]

_PAGE, _MODEL, _SKIPPED, _UNFINISHED = "index.html", "model.ckpt", "skipped.csv", "unfinished"
_STATE = "training.ckpt"
_TABLES = ("assignments", "neighbours")
_OUTPUTS = (
    _PAGE,
    _MODEL,
    _SKIPPED,
    *(f"{table}.{kind}" for table in _TABLES for kind in ("csv", "parquet")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: see `c2bin_explore.main`."""
    args = _parser().parse_args(arguments)
    try:
        _run(args)
    except ExploreError as error:
        print(f"c2bin-explore: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"c2bin-explore: {shown(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nc2bin-explore: stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="c2bin-explore",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="images, in subfolders too")
    add("--out", type=Path, metavar="DIR", help="where to write (default: FOLDER's name-explore)")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    add("--checkpoint", type=Path, metavar="FILE", help="use this model.ckpt; do not train")
    add("--epochs", type=int, metavar="N", help="times each image is seen (default: 10 to 100)")
    add("--image-size", type=int, metavar="PX", help="training size (default: 32 to 96, by images)")
    add(
        "--clusters",
        type=int,
        nargs=3,
        metavar=("COARSE", "MIDDLE", "FINE"),
        help="clusters per scale (default: 8 32 128, fewer below 1,280 images)",
    )
    add("--backbone", choices=training.BACKBONES, help="network (default: small)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, views and map (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raise an ExploreError for an argument that no folder could make right."""
    if args.epochs is not None and args.epochs < 1:
        raise ExploreError(f"--epochs: expected 1 or more, got {args.epochs}")
    if args.image_size is not None and not 16 <= args.image_size <= 512:
        raise ExploreError(f"--image-size: expected 16 to 512, got {args.image_size}")
    if not 0 <= args.seed < 2**32:
        raise ExploreError(f"--seed: expected 0 to 2**32 - 1, got {args.seed}")
    clusters = args.clusters
    if clusters is not None and (min(clusters) < 2 or sorted(clusters) != clusters):
        raise ExploreError(
            f"--clusters: expected three numbers of at least 2, coarse to fine, got {clusters}"
        )


def _run(args: argparse.Namespace) -> None:
    _check(args)
    kind = training.accelerator(args.device)
    loaded = None
    if args.checkpoint is not None:
        loaded = training.load(args.checkpoint)
        _check_fits(args, loaded[1])
    folder: Path = args.folder
    title = shown(folder.resolve().name or str(folder.resolve()))
    out: Path = args.out or Path(f"{folder.resolve().name or 'images'}-explore")
    if out.exists() and not out.is_dir():
        raise ExploreError(f"--out {shown(str(out))}: expected a folder, got a file")

    paths, left_out = files.find(folder, exclude=out)
    if not paths:
        raise ExploreError(f"{shown(str(folder))} holds no files")
    unfinished = _begin(args, out, folder, paths)

    if loaded is None:
        side = files.typical_side(folder, paths) or 0.0
        size = args.image_size or training.default_image_size(side, gpu=kind == "gpu")
    else:
        size = loaded[1].image_size
    thumbnail = pages.thumbnail_side(len(paths))
    images = files.read_all(folder, paths, size, thumbnail, unfinished / "images")
    skipped = sorted([*left_out, *images.skipped])
    _report_skipped(skipped)
    if len(images.paths) < 2:
        shutil.rmtree(unfinished)
        raise ExploreError(
            f"{shown(str(folder))}: expected at least 2 images that can be read, got "
            f"{len(images.paths)} (of {len(paths)} files)"
        )

    pixels = torch.from_numpy(images.pixels)
    if loaded is None:
        settings = _settings(args, len(images.paths), size)
        print(
            f"{len(images.paths):,} images at {size} × {size} px; {settings.epochs} epochs of "
            f"batches of {settings.batch_size}; {', '.join(map(str, settings.clusters))} clusters"
        )
        model = training.train(pixels, settings, unfinished / _STATE, kind)
    else:
        model, settings = loaded
        model.to("cuda" if kind == "gpu" else kind)

    features, heads = training.embed(model, pixels)
    if not bool(torch.isfinite(features).all()):
        raise ExploreError("the model's features are not finite: the checkpoint is of no use")
    print("Neighbours, map and thumbnails: up to a minute or two for some thousand images")
    result = analysis.analyse(images, features, heads, args.seed)
    thumbnails = files.fit_budget(images.thumbnails, thumbnail, pages.THUMBNAIL_BUDGET)

    for name, (columns, rows) in analysis.tables(result).items():
        analysis.write_csv(out / f"{name}.csv", columns, rows)
        if analysis.has_parquet():
            analysis.write_parquet(out / f"{name}.parquet", columns, rows)
        else:
            # An earlier run's would disagree with the new CSV.
            (out / f"{name}.parquet").unlink(missing_ok=True)
    named = [(shown(path), shown(reason)) for path, reason in skipped]
    analysis.write_csv(out / _SKIPPED, ["file", "reason"], lambda: iter(named))
    with whole_file(out / _MODEL) as part:
        training.save(model, settings, part)
    described = _described(settings, len(images.paths), len(skipped), kind, loaded is not None)
    text = pages.page(
        result,
        images.paths,
        thumbnails,
        skipped,
        described,
        title,
        pages.relative_link(folder, out),
    )
    with whole_file(out / _PAGE) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    shutil.rmtree(unfinished)
    _report(out, result)


def _check_fits(args: argparse.Namespace, settings: training.Settings) -> None:
    """Raise an ExploreError if an option says otherwise than the checkpoint."""
    if args.epochs is not None:
        raise ExploreError("--epochs: nothing is trained with --checkpoint; leave one of them out")
    for option, given, stored in (
        ("--backbone", args.backbone, settings.backbone),
        ("--image-size", args.image_size, settings.image_size),
        ("--clusters", args.clusters and tuple(args.clusters), settings.clusters),
    ):
        if given is not None and given != stored:
            raise ExploreError(
                f"{option}: the checkpoint was trained with {stored}, got {given}; leave it out"
            )


def _begin(args: argparse.Namespace, out: Path, folder: Path, paths: Sequence[str]) -> Path:
    """Return the folder of unfinished work: an interrupted run's if it was this very command."""
    there = [name for name in _OUTPUTS if (out / name).exists()]
    if there and not args.overwrite:
        raise ExploreError(
            f"{shown(str(out))} already holds {', '.join(there)}: --overwrite replaces them, "
            "--out DIR writes elsewhere"
        )
    unfinished = out / _UNFINISHED
    record = unfinished / "run.json"
    options = {
        name: str(getattr(args, name))
        for name in ("epochs", "image_size", "clusters", "backbone", "seed", "device", "checkpoint")
    }
    run = {"options": options, "files": files.fingerprint(folder, paths)}
    state = unfinished / _STATE
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) == run:
        print(f"Going on with the unfinished run in {shown(str(unfinished))}")
    elif state.exists():
        if not args.overwrite:
            raise ExploreError(
                f"{shown(str(unfinished))} is an interrupted run with other options or other "
                "images: its own command goes on with it, --overwrite starts anew, --out DIR "
                "writes elsewhere"
            )
        state.unlink()
    unfinished.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as part:
        part.write_text(json.dumps(run), encoding="utf-8")
    return unfinished


def _settings(args: argparse.Namespace, images: int, size: int) -> training.Settings:
    batch = min(training.LARGEST_BATCH, images)
    clusters = tuple(args.clusters or training.default_clusters(images))
    if max(clusters) > batch:
        raise ExploreError(
            f"--clusters: expected at most {batch}, the images of a batch, got {max(clusters)}"
        )
    return training.Settings(
        backbone=args.backbone or training.BACKBONES[0],
        image_size=size,
        clusters=clusters,
        epochs=args.epochs or training.default_epochs(images),
        batch_size=batch,
        seed=args.seed,
    )


def _described(
    settings: training.Settings, images: int, skipped: int, kind: str, reused: bool
) -> dict[str, str]:
    """Return what the page states about the run."""
    trained = (
        f"{settings.epochs} epochs, batches of {settings.batch_size}, from random weights, "
        f"seed {settings.seed}"
    )
    return {
        "Images": f"{images:,}",
        "Files skipped": f"{skipped:,}",
        "Training": f"none on these images; the model of an earlier run: {trained}"
        if reused
        else trained,
        "Network": f"{settings.backbone}, images of {settings.image_size} × {settings.image_size}"
        " px",
        "Clusters": ", ".join(map(str, settings.clusters)),
        "Device": {"gpu": "CUDA GPU", "mps": "Apple GPU"}.get(kind, "CPU"),
        "Versions": ", ".join(
            f"{package} {version(package)}"
            for package in ("c2bin-ext", "torch", "lightly", "scikit-learn", "pillow")
        )
        + f", Python {platform.python_version()}",
    }


def _report_skipped(skipped: Sequence[files.Skipped]) -> None:
    if not skipped:
        return
    counts = Counter(reason.partition(":")[0] for _, reason in skipped)
    print(f"{len(skipped):,} skipped ({', '.join(f'{r}: {n:,}' for r, n in counts.items())}):")
    for path, reason in skipped[:10]:
        print(f"  {shown(path)}: {shown(reason)}")
    if len(skipped) > 10:
        print(f"  and {len(skipped) - 10:,} more; all are in {_SKIPPED}")


def _report(out: Path, result: analysis.Result) -> None:
    for scale in result.scales:
        scores = ", ".join(
            f"{name.upper()} {scale.scores[name]:.3f}"
            for name in ("nmi", "acc")
            if name in scale.scores
        )
        used = f"{scale.scores['in_use']:.0f} of {scale.count} clusters hold images"
        print(f"{scale.name:>7}: {used}{'; ' + scores if scores else ''}")
        if scale.scores["in_use"] < max(2, scale.count / 10):
            print(
                "         which has collapsed: try more --epochs, fewer --clusters or a new --seed"
            )
    if not analysis.has_parquet():
        print("No Parquet files, only CSV: they need pyarrow (pip install pyarrow)")
    size = (out / _PAGE).stat().st_size / 1e6
    print(f"Open {shown(str(out / _PAGE))} in a browser ({size:.1f} MB)")
