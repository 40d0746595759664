"""Cluster features of a pretrained network by C2BIN and by other methods, and compare them.

    python examples/features.py --images FOLDER --views 4
    python examples/features.py --images TRAIN.npz --test-images TEST.npz --limit 5000
    python examples/features.py --features FILE.npz

--images takes a folder (subfolders are classes), an .npz of JPEGs (arrays jpeg, offsets, labels) or
`digits`. --features takes an .npz with `features` (n, d) and, if there are any, `labels` (n,),
`views` (v, n, d), `test_features` and `test_labels`. Scores are of test images that nothing was
trained on; without any, a fifth of the images is held out. Features and finished runs are kept in
--cache: Ctrl-C at any time, and the same command goes on. --validation N scores on N training
images instead, which is what settings are chosen by. --table label-free takes the scored images and
sets of scikit-learn, to see how far the estimator's label-free scores can be trusted.
The network and heads run on --device; --processes N makes views in N processes, the same as in one,
and fits N rows of the table side by side.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from c2bin_explore.networks import NotInstalledError, WeightsError
from joblib import Parallel, delayed
from tqdm import tqdm

import c2bin_ext
from c2bin_ext import metrics
from experiments import cluster_losses
from experiments.features import images, label_free
from experiments.features.extraction import Extractor
from experiments.features.methods import Method, ablations, rows
from experiments.hardware import hardware, versions
from experiments.store import write

Array = npt.NDArray[Any]
SCORES = {
    "NMI": metrics.normalized_mutual_information,
    "ACC": metrics.clustering_accuracy,
    "purity": metrics.purity,
    "ARI": metrics.adjusted_rand_index,
}


@dataclass(frozen=True)
class Data:
    """Features to cluster, and those that are scored."""

    train: Array
    views: Array | None
    test: Array
    labels: Array
    about: dict[str, Any]

    def arrays(self) -> list[Array]:
        """Return all that there are."""
        arrays = (self.train, self.views, self.test, self.labels)
        return [array for array in arrays if array is not None]

    def digest(self) -> str:
        """Return a digest of all values: results of different features never mix."""
        digest = hashlib.sha256()
        for array in self.arrays():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="a folder, an .npz of JPEGs, or digits")
    source.add_argument("--features", type=Path, help="an .npz of features")
    parser.add_argument("--test-images", help="as --images; scored, never trained on")
    parser.add_argument(
        "--network",
        default="efficientnet-lite0",
        help="efficientnet-lite0, or a name of torchvision or timm",
    )
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--views", type=int, default=4, help="augmented views of each image")
    parser.add_argument("--limit", type=int, help="training images at most")
    parser.add_argument("--limit-test", type=int, help="test images at most")
    parser.add_argument("--validation", type=int, help="score on so many training images instead")
    parser.add_argument("--clusters", type=int, help="K (default: the number of classes)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", choices=("rivals", "ablations", "label-free"), default="rivals")
    parser.add_argument("--only", nargs="+", help="rows by name")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=gpu, help=f"default: {gpu}")
    parser.add_argument(
        "--processes", type=int, default=1, help="that make views, and that fit (default: 1)"
    )
    parser.add_argument("--cache", type=Path, default=Path("build/features"))
    parser.add_argument("--out", type=Path, help="folder of NAME.json and NAME.md")
    parser.add_argument("--name", default="features", help="of the files in --out")
    return parser.parse_args(arguments)


def load(args: argparse.Namespace) -> Data:
    """Return the features of the images, or those of the file.

    Raises:
        ValueError: images without labels, or arrays that do not fit each other.
    """
    if args.features:
        return _from_file(args)
    train = _shuffled(images.load(args.images))
    n = len(train)
    held = args.validation or (0 if args.test_images else max(1, n // 5))
    test = (
        _shuffled(images.load(args.test_images))
        if args.test_images and not args.validation
        else train.some(np.arange(n - held, n))
    )
    train = train.some(np.arange(min(args.limit or n, n - held)))
    test = test.some(np.arange(min(args.limit_test or len(test), len(test))))
    if (test.labels < 0).any():
        raise ValueError(f"images: {test.name} has no classes to score clusters with")
    workers = args.processes if args.processes > 1 else 0
    cache = args.cache / "extracted"
    extractor = Extractor(args.network, args.size, cache, args.device, workers)
    features, views = extractor.features(train, args.views)
    about = {
        "images": train.name,
        "test_images": f"{held} held out of {train.name}" if held else test.name,
        "network": args.network,
        "size": args.size,
    }
    return Data(features, views, extractor.features(test)[0], test.labels, about)


def _shuffled(pictures: images.Pictures) -> images.Pictures:
    return pictures.some(np.random.default_rng(0).permutation(len(pictures)))


def _from_file(args: argparse.Namespace) -> Data:
    with np.load(args.features) as file:
        arrays = {name: file[name] for name in file.files}
    if "features" not in arrays or not {"labels", "test_labels"} & set(arrays):
        raise ValueError(
            f"features: expected the arrays features and labels in {args.features}, "
            f"got {', '.join(arrays) or 'none'}"
        )
    train, views = arrays["features"], arrays.get("views")
    test, labels = arrays.get("test_features"), arrays.get("test_labels")
    if test is None or labels is None or args.validation:
        order = np.random.default_rng(0).permutation(len(train))
        kept, held = np.split(order, [len(order) - (args.validation or len(order) // 5)])
        test, labels = train[held], arrays["labels"][held]
        train, views = train[kept], None if views is None else views[:, kept]
    limit = args.limit or len(train)
    train, views = train[:limit], None if views is None else views[:, :limit]
    some = args.limit_test or len(test)
    about = {"images": args.features.name, "test_images": args.features.name}
    return Data(train, views, test[:some], labels[:some].astype(np.int64), about)


class Memory:
    """The most memory that a piece of work takes beyond what is held before, where Linux tells."""

    def __init__(self) -> None:
        try:
            # What was freed would be taken again unseen.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before: int | None = self._status("VmRSS")
        except (OSError, AttributeError, TypeError):
            self.before = None

    def peak(self) -> float | None:
        """Return MiB."""
        return None if self.before is None else (self._status("VmHWM") - self.before) / 1024

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))


def run(method: Method, data: Data, k: int, seed: int, device: str) -> dict[str, Any]:
    """Fit one method with one seed; return its scores on the test images."""
    estimator = method.build(k, data.train.shape[1], seed, device)
    for array in data.arrays():
        # Another process maps them: a byte of every page, so that memory is of the fit.
        array.reshape(-1).view(np.uint8)[::4096].max()
    on_gpu = device == "cuda" and method.kind != "classical"
    if on_gpu:
        torch.ones(2, 2, device=device).matrix_power(2)  # what CUDA loads once is not of the fit
        torch.cuda.reset_peak_memory_stats()
    memory, began, worked = Memory(), time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        # Ctrl-C ends training early: no run that is finished.
        warnings.filterwarnings("error", "Interrupted")
        try:
            estimator.fit(data.train, **({"views": data.views} if method.views else {}))
        except UserWarning as warning:
            if "Interrupted" not in str(warning):
                raise
            raise KeyboardInterrupt from warning
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    result = {"seconds": seconds, "cpu_seconds": processor, "peak_beyond_mib": memory.peak()}
    if on_gpu:
        result["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    labels = estimator.predict(data.test)
    result |= {name: score(data.labels, labels) for name, score in SCORES.items()}
    result["in_use"] = len(np.unique(labels))
    if hasattr(estimator, "loss_"):
        result |= {"loss": estimator.loss_, "epochs": estimator.n_iter_}
    return result


def kept_run(
    method: Method, data: Data, k: int, seed: int, folder: Path, digest: str, device: str
) -> Any:
    """Return a run that was finished before, or finish it and keep it."""
    about = [asdict(method), k, seed, digest, code(method.kind)]
    if device != "cpu" and method.kind != "classical":
        about.append(device)
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    path = folder / "runs" / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    result = {"seed": seed, **run(method, data, k, seed, device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(result))
    return result


@cache
def code(kind: str) -> str:
    """Return a digest of the code that a run depends on, so that a change of it runs again."""
    files = [Path(__file__).with_name("rivals.py")]
    if kind != "classical":
        files += [Path(__file__).with_name("methods.py"), Path(cluster_losses.__file__)]
        files += sorted(Path(c2bin_ext.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _cell(values: list[Any], form: str) -> str:
    if any(value is None for value in values):
        return "-"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return Markdown: one line a method, mean ± standard deviation over seeds."""
    columns = {name: (name, ".3f") for name in SCORES}
    columns |= {"cpu_seconds": ("CPU seconds", ".0f"), "peak_beyond_mib": ("peak MiB", ".0f")}
    if any("gpu_peak_mib" in run for runs in results.values() for run in runs):
        columns["gpu_peak_mib"] = "GPU MiB", ".0f"
    titles = [title for title, _ in columns.values()]
    lines = [f"| clusters by | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(columns)]
    for name, runs in results.items():
        cells = [
            _cell([run.get(name) for run in runs], form) for name, (_, form) in columns.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(settings: dict[str, Any]) -> str:
    """Return what has to be known to read the table."""
    of = settings
    source = f"{of['images']}, scored on {of['test_images']}"
    if "network" in of:
        source += f"; {of['network']}, ImageNet weights, images scaled to {of['size']} px"
    seeds = ", ".join(map(str, of["seeds"]))
    own, fits = of["hardware"], of["processes"]
    machine = f"{own['cpu']}, "
    machine += f"{own['torch_threads']} thread(s)" if fits == 1 else f"{fits} fits side by side"
    if of["device"] == "cuda":
        machine += f", network and heads on {own['gpu']}"
    return (
        f"{source}. {of['train']} training and {of['test']} scored images of {of['d']} features, "
        f"{of['view_count']} stored augmented views, K = {of['k']}. Mean ± standard deviation of "
        f"seeds {seeds}; methods without randomness once. {machine}; seconds are of the processor, "
        "for fitting; peak is memory beyond what was held before.\n\n"
        "k-means and mini-batch k-means: best of ten starts. Where no scaling is named, features "
        "are standardised, projected to 256 principal directions and L2-normalised; Gaussian "
        "mixture: 64 more principal directions, HDBSCAN: 20. Methods that cannot predict label "
        "test images by a vote of 10 neighbours. IIC, PICA, SCAN and CC are their cluster losses, "
        "with the weights of their papers, on heads, start, pairs and training of C2BIN.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse(arguments)
    try:
        return compare(args)
    except (NotInstalledError, ValueError, WeightsError) as error:
        print(f"features: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return 130


def compare(args: argparse.Namespace) -> int:
    """Fit every method with every seed and report."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no GPU")
    data = load(args)
    k = args.clusters or len(np.unique(data.labels))
    seen = data.views is not None
    if args.table == "label-free":
        return trust(args, data)
    methods = rows(seen) if args.table == "rivals" else ablations(k, seen)
    if args.only:
        unknown = set(args.only) - {method.name for method in methods}
        if unknown:
            raise ValueError(f"--only: no row is called {', '.join(sorted(unknown))}")
        methods = [method for method in methods if method.name in args.only]
    settings = {
        **data.about,
        **{"table": args.table, "train": len(data.train), "test": len(data.test), "k": k},
        **{"d": data.train.shape[1], "view_count": 0 if data.views is None else len(data.views)},
        **{"seeds": args.seeds, "device": args.device, "processes": args.processes},
        **{"hardware": hardware(), "versions": versions()},
    }
    digest = data.digest()
    results: dict[str, list[Any]] = {method.name: [] for method in methods}
    # Seed by seed, so that a table of fewer seeds is there early.
    plan = [(m, seed) for seed in args.seeds for m in methods if m.seeded or seed == args.seeds[0]]
    task = delayed(kept_run)
    # One by one: runs that are there already must not put others into one batch.
    runs = Parallel(n_jobs=args.processes, batch_size=1, return_as="generator")(
        task(method, data, k, seed, args.cache, digest, args.device) for method, seed in plan
    )
    for (method, seed), result in zip(bar := tqdm(plan, unit="run"), runs, strict=True):
        bar.set_postfix_str(f"{method.name}, seed {seed}")
        results[method.name].append(result)
    report(args, settings, results, f"{table(results)}\n\n{notes(settings)}")
    return 0


def trust(args: argparse.Namespace, data: Data) -> int:
    """Compare the scores without labels with those by labels."""
    name = str(data.about["test_images"])
    given = {**label_free.sets(), name: (data.test.astype(np.float32), data.labels)}
    results = label_free.run(given, args.seeds, args.device)
    settings = {**data.about, "seeds": args.seeds, "device": args.device}
    settings |= {"hardware": hardware(), "versions": versions()}
    report(args, settings, results, f"{label_free.table(results, given)}\n")
    return 0


def report(args: argparse.Namespace, settings: Any, results: Any, text: str) -> None:
    """Print a table and, if wanted, write it beside its numbers."""
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        found = json.dumps({"settings": settings, "results": results}, indent=1)
        write(args.out / f"{args.name}.json", found + "\n")
        write(args.out / f"{args.name}.md", text)
