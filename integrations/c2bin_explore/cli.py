"""Look at a folder of images: clusters, neighbours, duplicates and more in one HTML page.

  c2bin-explore FOLDER                               or: python -m c2bin_explore FOLDER
  c2bin-explore FOLDER --clusters 5 20 80 --overwrite        other clusters, from its cache
  c2bin-explore NEW --checkpoint OUT/model.ckpt      other images, the same clusters
  c2bin-explore apply FILE                           copy or link what was selected in the page

FOLDER may hold images of any size and format that Pillow reads, in subfolders too; they need no
labels. What a network pretrained on ImageNet sees in them is clustered: efficientnet-lite0 if it is
installed, or --backbone NAME. Without one, a small network is trained on the images themselves.
Ctrl-C at any time: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from c2bin_explore import analysis, applying, embedding, networks, training
from c2bin_explore import images as files
from c2bin_explore import page as pages
from c2bin_explore.embedding import Embedder
from c2bin_explore.images import Array, ExploreError, Skipped, Tell, shown
from c2bin_ext._hosts import whole_file
from c2bin_ext.clustering import C2BINClustering

__all__ = ["main"]

_PAGE, _MODEL, _SKIPPED = "index.html", "model.ckpt", "skipped.csv"
_TABLES = ("assignments", "neighbours")
_OUTPUTS = (
    _MODEL,
    _SKIPPED,
    *(f"{table}.{kind}" for table in _TABLES for kind in ("csv", "parquet")),
    pages.THUMBNAILS,
    _PAGE,
)
# The folder of outputs that are being written, the list of them once they are complete, and what is
# kept from run to run.
_UNFINISHED, _RECORD, _CACHE = "c2bin-explore-unfinished", "run.json", "cache"
_DEFAULT = networks.EFFICIENTNETS[0]
_SCALES = (10, 30, 90, 270)
_SIDE_OF_FEATURES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: see `c2bin_explore.main`."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no "é" gets "\\xe9" instead of an exception.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["apply"]:
            return applying.main(given[1:])
        _run(_parser().parse_args(given))
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
    parser = applying.parser_of(__doc__, "c2bin-explore")
    add = parser.add_argument
    path = applying.path
    add("folder", type=path, metavar="FOLDER", help="images, in subfolders too")
    add("--out", type=path, metavar="DIR", help="where to write (default: FOLDER's name-explore)")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    add(
        "--backbone",
        metavar="NAME",
        help="pretrained network: efficientnet-lite0, -lite1, -lite2, or a name of torchvision or "
        f"timm, whose weights are downloaded (default: {_DEFAULT} if installed); with --train "
        "small, resnet18 or resnet50",
    )
    add("--weights", type=path, metavar="FILE", help="weights of --backbone; nothing is downloaded")
    add("--features", type=path, metavar="FILE", help="features and names: .npz, .npy or .parquet")
    add("--train", action="store_true", help="train from scratch on the images")
    add("--epochs", type=int, metavar="N", help="times training sees each image; means --train")
    add("--checkpoint", type=path, metavar="FILE", help="clusters of an earlier run's model.ckpt")
    add(
        "--clusters",
        type=int,
        nargs="+",
        metavar="K",
        help=f"clusters per scale, coarse to fine (default: {' '.join(map(str, _SCALES))}, those "
        "of ten images on average)",
    )
    add("--image-size", type=int, metavar="PX", help="what the network sees (default: its own)")
    add("--views", type=int, default=2, metavar="N", help="random views of each image (default: 2)")
    add(
        "--labels",
        choices=("auto", "folders", "none"),
        default="auto",
        help="whether first-level folders are classes (default: if they look so)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of clusters and map (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raise an ExploreError for arguments that no folder could make right."""
    if args.epochs is not None and args.epochs < 1:
        raise ExploreError(f"--epochs: expected 1 or more, got {args.epochs}")
    if args.image_size is not None and not 16 <= args.image_size <= 1024:
        raise ExploreError(f"--image-size: expected 16 to 1024, got {args.image_size}")
    if not 0 <= args.views <= 16:
        raise ExploreError(f"--views: expected 0 to 16, got {args.views}")
    if not 0 <= args.seed < 2**31:
        raise ExploreError(f"--seed: expected 0 to 2**31 - 1, got {args.seed}")
    scales = args.clusters
    if scales is not None and (min(scales) < 2 or sorted(set(scales)) != scales):
        raise ExploreError(
            f"--clusters: expected numbers of at least 2, coarse to fine, got {scales}"
        )
    args.train = args.train or args.epochs is not None
    wanted = {
        "--train": args.train,
        "--weights": args.weights,
        "--features": args.features,
        "--checkpoint": args.checkpoint,
    }
    given = [name for name, value in wanted.items() if value]
    if len(given) > 1 and set(given) != {"--features", "--checkpoint"}:
        raise ExploreError(f"{' and '.join(given)}: expected one of them")
    if args.weights and not args.backbone:
        raise ExploreError("--weights: expected --backbone NAME too, the network that they are of")
    for option, value in (
        ("--backbone", args.backbone),
        ("--image-size", args.image_size),
        ("--clusters", args.checkpoint and scales),
    ):
        if value is not None and (args.features or args.checkpoint) and value:
            other = "--checkpoint" if args.checkpoint else "--features"
            raise ExploreError(f"{option}: {other} decides it; leave one of them out")
    for option in ("weights", "features"):
        file = getattr(args, option)
        if file and not file.is_file():
            raise ExploreError(f"--{option}: there is no file {shown(str(file))}")


def _device(name: str) -> str:
    """Return torch's name of the device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((name for name, there in found.items() if there), "cpu")
    if not found.get(name, True):
        raise ExploreError(f"--device {name}: torch finds no such device here; try --device auto")
    return name


class _Progress:
    """One bar for the whole run, in seconds that its phases are expected to take.

    Only their proportions matter: the time left follows from the time they really took.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.end, self.number = seconds, 0.0, 0
        form = "{desc} {percentage:3.0f}%|{bar:24}| {elapsed} so far, {remaining} left in all"
        self.bar = tqdm(total=sum(seconds.values()), smoothing=0, bar_format=form)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._to(self.bar.total)
        self.bar.close()

    def _to(self, seconds: float) -> None:
        self.bar.update(max(0.0, min(seconds, self.bar.total) - self.bar.n))

    def phase(self, name: str) -> Tell:
        """Begin a phase; return what is to be told how much of it is done."""
        self._to(self.end)
        self.number += 1
        self.bar.set_description_str(f"{name} ({self.number} of {len(self.seconds)})")
        start, share, first = self.end, self.seconds[name], -1
        self.end += share

        def tell(done: int, total: int) -> None:
            nonlocal share, first
            if first < 0:  # what an earlier run has done takes no time
                first = done
                saved = share * done / max(total, 1)
                share, self.end = share - saved, self.end - saved
                self.bar.total -= saved
            part = (done - first) / max(total - first, 1)
            self._to(start + share * part)

        return tell


def _run(args: argparse.Namespace) -> None:
    _check(args)
    folder: Path = args.folder
    out: Path = args.out or Path(f"{folder.resolve().name or 'images'}-explore")
    if out.exists() and not out.is_dir():
        raise ExploreError(f"--out {shown(str(out))}: expected a folder, got a file")
    if out.exists() and folder.exists() and out.samefile(folder):
        raise ExploreError(
            f"--out {shown(str(out))} is the folder of the images: expected another one, which may "
            "lie in it"
        )
    paths, left_out = files.find(folder, exclude=out)
    if not paths:
        raise ExploreError(f"{shown(str(folder))} holds no files")
    if args.clusters and args.clusters[-1] > len(paths):
        raise ExploreError(
            f"--clusters: expected at most {len(paths):,}, the files of the folder, "
            f"got {args.clusters[-1]:,}"
        )
    options = {name: str(value) for name, value in vars(args).items() if name != "overwrite"}
    run = hashlib.sha256(json.dumps(options).encode()).hexdigest() + files.fingerprint(
        folder, paths
    )
    if _went_on(out, run):
        print(f"Finished the interrupted run: open {shown(str(out / _PAGE))} in a browser")
        return
    there = [name for name in _OUTPUTS if (out / name).exists()]
    if there and not args.overwrite:
        raise ExploreError(
            f"{shown(str(out))} already holds {', '.join(there)}: --overwrite replaces them, "
            "--out DIR writes elsewhere"
        )
    new = not out.exists()
    try:
        _explore(args, out, paths, left_out, run)
    except (ExploreError, networks.NotInstalledError, networks.WeightsError, ValueError) as error:
        if new:
            for path in (out / _CACHE, out):
                if path.exists() and not any(path.iterdir()):
                    path.rmdir()
        raise ExploreError(str(error)) from error


def _went_on(out: Path, run: str) -> bool:
    """Finish the renaming that a kill interrupted, of whatever run; say whether it was this one."""
    unfinished = out / _UNFINISHED
    record = unfinished / _RECORD
    if not record.exists():  # nothing of it is complete, and what took long is in the cache
        shutil.rmtree(unfinished, ignore_errors=True)
        return False
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        own, names = str(content["run"]), list(content["files"])
    except (KeyError, TypeError, ValueError):
        aside = shown(str(files.set_aside(unfinished)))
        print(f"{aside}: a damaged unfinished run, set aside")
        return False
    _appear(out, names)
    return own == run


def _appear(out: Path, names: Sequence[str]) -> None:
    """Rename complete outputs to where they belong, the page last, and remove an earlier run's."""
    unfinished = out / _UNFINISHED
    for name in _OUTPUTS:
        ready = unfinished / name
        if name in names and not ready.exists():
            continue  # moved before a kill
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        elif name not in names:
            (out / name).unlink(missing_ok=True)
        if name in names:
            ready.replace(out / name)
    shutil.rmtree(unfinished)


@dataclass(frozen=True)
class _Source:
    """Where features come from: a network, yet to be trained or not, or a table of them."""

    embedder: Embedder | None = None
    trained: str | None = None  # the backbone to train
    table: embedding.Table | None = None
    clustering: C2BINClustering | None = None
    note: str = ""  # what the reader has to know first


def _source(args: argparse.Namespace, side: float) -> _Source:
    device = _device(args.device)
    table = embedding.read_features(args.features) if args.features else None
    if args.checkpoint:
        embedder, clustering = embedding.restore(args.checkpoint, device)
        if (embedder is None) != (table is not None):
            raise ExploreError(
                "--checkpoint: it was made of features, and needs --features FILE of the new images"
                if embedder is None
                else "--features: the checkpoint has a network of its own; leave one of them out"
            )
        return _Source(embedder, None, table, clustering)
    if table is not None:
        return _Source(table=table)
    name, size = args.backbone, args.image_size
    if not args.train:
        if name is None and networks.installed(_DEFAULT):
            name = _DEFAULT
        if name is not None:
            embedder = embedding.pretrained(name, args.weights, size, side, args.views, device)
            return _Source(embedder)
    name = name or training.BACKBONES[0]
    if name not in training.BACKBONES:
        known = ", ".join(training.BACKBONES)
        raise ExploreError(f"--backbone: expected one of {known} with --train, got {name}")
    size = size or training.default_image_size(side, gpu=device == "cuda")
    note = (
        "The network was trained from scratch, on these images only: expect groups of like colours "
        "and shapes rather than of like things."
    )
    if not args.train:
        note += f" For a pretrained one: {networks.install(_DEFAULT)}"
        print(note)
    embedder = embedding.scratch(name, size, args.views, device, args.seed)
    return _Source(embedder, name, note=note)


def _settings(args: argparse.Namespace, source: _Source, n: int) -> training.Settings | None:
    if source.embedder is None or source.trained is None:
        return None
    return training.settings_of(source.trained, source.embedder.size, n, args.epochs, args.seed)


def _explore(
    args: argparse.Namespace, out: Path, paths: list[str], left_out: list[Skipped], run: str
) -> None:
    folder: Path = args.folder
    source = _source(args, files.typical_side(folder, paths) or 0.0)
    if source.table is not None:
        rows = source.table[0]
        missing = [path for path in paths if path not in rows]
        paths = [path for path in paths if path in rows]
        if not paths:
            raise ExploreError(
                f"--features: none of its names, such as {shown(next(iter(rows), ''))!r}, is a "
                f"file in {shown(str(folder))}, such as {shown(missing[0])!r}"
            )
        left_out = [*left_out, *(Skipped(p, f"no row in {args.features.name}") for p in missing)]
    with _Progress(_seconds(len(paths), source)) as progress:
        images, features, views = _embedded(args, out, paths, source, progress)
        skipped, n = sorted([*left_out, *images.skipped]), len(images.paths)
        _report_skipped(skipped)
        if n < 2:
            raise ExploreError(
                f"{shown(str(folder))}: expected at least 2 images that can be read, got {n} (of "
                f"{len(paths)} files)"
            )
        if not np.isfinite(features).all():
            raise ExploreError("the network's features are not finite: its weights are of no use")
        clustering = source.clustering
        if clustering is None:
            scales = (
                args.clusters or [k for k in _SCALES if k <= n / 10] or [min(10, max(2, n // 3))]
            )
            if scales[-1] > n:
                raise ExploreError(
                    f"--clusters: expected at most {n:,}, the images that can be read, "
                    f"got {scales[-1]:,}"
                )
            device, tell = _device(args.device), progress.phase("Clusters")
            clustering = embedding.cluster(features, views, scales, args.seed, device, tell)
        result = analysis.analyse(
            images, features, clustering, args.labels, args.seed, progress.phase
        )
        about = _described(args, source, clustering, len(skipped), n)
        _write(args, out, result, images, skipped, source, clustering, about, progress)
        names = sorted(path.name for path in (out / _UNFINISHED).iterdir())
        with whole_file(out / _UNFINISHED / _RECORD) as part:
            part.write_text(json.dumps({"run": run, "files": names}), encoding="utf-8")
        _appear(out, names)
    _report(out, result)


def _seconds(n: int, source: _Source) -> dict[str, float]:
    """Return phases, and about how long each takes of n images, for their proportions."""
    size = source.embedder.size if source.embedder else 0
    seen = 1 + (source.embedder.views if source.embedder else 0)
    phases = {
        "Reading images": n * (0.03 + (0 if source.trained else seen * 0.02 * (size / 224) ** 2)),
        "Training": 300 * (size / 32) ** 2 if source.trained else 0.0,
        "Clusters": 0.0 if source.clustering else 5 + n * 4e-3,
        "Neighbours": n * n * 2e-8,
        "Map": 1 + min(n, 5000) * 4e-3 + n * 1e-4,
        "Writing": n * 1e-3,
    }
    return {name: seconds for name, seconds in phases.items() if seconds}


def _embedded(
    args: argparse.Namespace, out: Path, paths: list[str], source: _Source, progress: _Progress
) -> tuple[files.Images, Array, Array | None]:
    """Return images, features (n, d), and those of views (v, n, d), if there are any."""
    embedder, table = source.embedder, source.table
    size = embedder.size if embedder else _SIDE_OF_FEATURES
    thumbnail = pages.thumbnail_side(len(paths))
    plain = embedder is None or source.trained is not None
    about = (embedder.digest() if embedder and not plain else "", size, thumbnail)
    cache = out / _CACHE
    read = cache / hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    images = files.read_all(
        args.folder,
        paths,
        size,
        thumbnail,
        read,
        crop=embedder.crop if embedder else 1.0,
        resampling=embedder.network.interpolation if embedder else "BICUBIC",
        convert=np.asarray if embedder is None or plain else embedder,
        tell=progress.phase("Reading images"),
    )
    if len(images.paths) < 2:
        shutil.rmtree(read, ignore_errors=True)  # nothing can be made of it
    if table is not None:
        rows = [table[0][path] for path in images.paths]
        return images, table[1][rows], None if table[2] is None else table[2][:, rows]
    features = images.rows
    settings = _settings(args, source, len(images.paths)) if len(images.paths) > 1 else None
    if embedder is not None and settings is not None:
        own = (files.fingerprint(args.folder, images.paths), embedder.views, settings)
        kept = cache / f"trained-{hashlib.sha256(repr(own).encode()).hexdigest()[:16]}.ckpt"
        tell = progress.phase("Training")
        features = training.trained(embedder, images.rows, settings, kept, tell)
    views = features[:, 1:].transpose(1, 0, 2) if features.ndim == 3 else features[:0]
    return images, features[:, 0], views if len(views) else None


def _write(
    args: argparse.Namespace,
    out: Path,
    result: analysis.Result,
    images: files.Images,
    skipped: list[Skipped],
    source: _Source,
    clustering: C2BINClustering,
    about: dict[str, str],
    progress: _Progress,
) -> None:
    """Write all outputs to the folder of unfinished ones."""
    folder, unfinished, tell = args.folder, out / _UNFINISHED, progress.phase("Writing")
    unfinished.mkdir(parents=True)
    for name, (columns, rows) in analysis.tables(result).items():
        analysis.write_csv(unfinished / f"{name}.csv", columns, rows)
        if analysis.has_parquet():
            analysis.write_parquet(unfinished / f"{name}.parquet", columns, rows)
    named = [(shown(path), shown(reason)) for path, reason in skipped]
    analysis.write_csv(unfinished / _SKIPPED, ["file", "reason"], lambda: iter(named))
    embedding.save(unfinished / _MODEL, source.embedder, clustering)
    pages.write(
        unfinished,
        result,
        images,
        skipped,
        about,
        note=source.note,
        title=shown(folder.resolve().name or str(folder.resolve())),
        link=pages.relative_link(folder, out),
        tell=tell,
    )


def _described(
    args: argparse.Namespace, source: _Source, clustering: C2BINClustering, skipped: int, n: int
) -> dict[str, str]:
    """Return what the page states about the run."""
    embedder, settings = source.embedder, _settings(args, source, n)
    if embedder is None:
        network = f"none: features of {shown(args.features.name)}"
    elif settings is not None:
        network = (
            f"{settings.backbone}, from random weights, {settings.epochs} epochs of batches of "
            f"{settings.batch_size}"
        )
    elif args.weights:
        network = f"{embedder.name}, weights of {shown(args.weights.name)}"
    else:
        network = embedder.name
        if not source.clustering:
            network += f", published weights (licence: {embedder.network.licence})"
    seen = f"; sees {embedder.size} × {embedder.size} px" if embedder else ""
    views = f", {embedder.views} random views of each image" if embedder and embedder.views else ""
    return {
        "Files skipped": f"{skipped:,}",
        "Network": network + seen,
        "Clusters": f"those of {shown(str(args.checkpoint))}"
        if source.clustering
        else f"C2BINClustering of {clustering.n_features_in_:,} features{views}, seed {args.seed}",
        "Device": {"cuda": "CUDA GPU", "mps": "Apple GPU"}.get(_device(args.device), "CPU"),
        "Versions": ", ".join(
            f"{package} {version(package)}"
            for package in ("c2bin-ext", "torch", "scikit-learn", "pillow")
        )
        + f", Python {platform.python_version()}",
    }


def _report_skipped(skipped: Sequence[Skipped]) -> None:
    if not skipped:
        return
    counts = Counter(reason.partition(":")[0] for _, reason in skipped)
    said = [f"{len(skipped):,} skipped ({', '.join(f'{r}: {n:,}' for r, n in counts.items())}):"]
    said += [f"  {shown(path)}: {shown(reason)}" for path, reason in skipped[:10]]
    if len(skipped) > 10:
        said.append(f"  and {len(skipped) - 10:,} more; all are in {_SKIPPED}")
    if any("pillow-heif" in reason for _, reason in skipped):
        said.append("HEIC and AVIF need pillow-heif: pip install pillow-heif")
    tqdm.write("\n".join(said))


def _report(out: Path, result: analysis.Result) -> None:
    for scale in result.scales:
        scores = "".join(
            f"; {name.upper()} {scale.scores[name]:.3f}"
            for name in ("nmi", "acc")
            if name in scale.scores
        )
        used = scale.scores["in_use"]
        print(f"{scale.count:>5} clusters: {used:.0f} hold images{scores}")
        if used < max(2, scale.count / 10):
            print("      which has collapsed: try fewer --clusters or another --backbone")
    if not analysis.has_parquet():
        print("No Parquet files, only CSV: they need pyarrow (pip install pyarrow)")
    size = (out / _PAGE).stat().st_size / 1e6
    print(f"Open {shown(str(out / _PAGE))} in a browser ({size:.1f} MB)")
