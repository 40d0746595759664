"""How good the clusters and neighbours of c2bin-explore are, and how long they take.

    python examples/benchmarks/explore_quality.py FOLDER [--out docs/results] [--keep DIR]
    python examples/benchmarks/explore_quality.py --photographs 3000
    python examples/benchmarks/explore_quality.py --many 100000

FOLDER has a subfolder for each class. The command runs on it three times, in processes of their
own: with its defaults (EfficientNet-Lite0), with a network trained from scratch, and with the
images' own pixels at 32 × 32 as features. With --only, some of these are measured, and the others
stay as they are in --out. With --photographs, it runs with its defaults on so many files of 12
megapixels: a tenth as many different ones, made of scikit-learn's two photographs. With --many, it
runs on so many small files, all the same image, and 64 features of each, drawn around 100 centres.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from c2bin_explore import images as files
from hardware import processor
from PIL import Image
from sklearn.datasets import load_sample_images

from c2bin_ext.metrics import normalized_mutual_information

CLUSTERS = ("10", "30", "90", "270")
ROWS: dict[str, tuple[str, ...]] = {
    "EfficientNet-Lite0": ("--backbone", "efficientnet-lite0"),
    "from scratch": ("--train",),
    "pixels": (),
}


def explore(folder: Path, out: Path, *options: str) -> dict[str, float]:
    """Run the command; return its seconds, by the clock and of the processor, and its memory."""
    command = [sys.executable, "-m", "c2bin_explore", str(folder), "--out", str(out), *options]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--device", "cpu", "--overwrite"])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(1)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }


def rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def scores(out: Path) -> dict[str, Any]:
    """Return the share of neighbours of the same class, and NMI with the classes per scale."""
    assigned = rows(out / "assignments.csv")
    classes = sorted({row["label"] for row in assigned})
    label = {row["file"]: classes.index(row["label"]) for row in assigned}
    near = [label[row["file"]] == label[row["neighbour"]] for row in rows(out / "neighbours.csv")]
    truth = torch.tensor(list(label.values()))
    nmi = {
        k: normalized_mutual_information(
            truth, torch.tensor([int(row[f"cluster_{k}"]) for row in assigned])
        )
        for k in CLUSTERS
    }
    return {"same_class_of_12": sum(near) / len(near), "nmi": nmi}


def pixels(folder: Path, out: Path) -> Path:
    """Write the images' pixels at 32 × 32 as a file of features."""
    paths, _ = files.find(folder, exclude=out)
    values = files.read_all(folder, paths, 32, 16, out / "pixels").rows
    table = out / "pixels.npz"
    np.savez(table, names=np.array(paths), features=values.reshape(len(values), -1) / 255)
    return table


def write_photographs(count: int, out: Path) -> None:
    """Write so many JPEG files of 4000 × 3000 pixels, of which a tenth are different."""
    draw, sources = np.random.default_rng(0), load_sample_images().images
    different = max(1, count // 10)
    for number in range(count):
        path = out / f"photograph {number:04}.jpg"
        if number >= different:
            os.link(out / f"photograph {number % different:04}.jpg", path)
            continue
        source = sources[number % 2]
        height, width = 210, 280
        top, left = draw.integers(len(source) - height), draw.integers(source.shape[1] - width)
        crop = Image.fromarray(source[top : top + height, left : left + width])
        large = np.asarray(crop.resize((4000, 3000), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = draw.integers(-12, 13, size=large.shape[:2], dtype=np.int16)[..., None]
        grainy = (large + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(path, quality=88)


def write_many(count: int, out: Path) -> Path:
    """Write so many files of one image, and a file of their features, which is returned."""
    draw, names = np.random.default_rng(0), [f"{i // 1000:03}/{i:06}.jpg" for i in range(count)]
    image = Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8))
    for i, name in enumerate(names):
        path = out / "images" / name
        if i % 1000:
            os.link(out / "images" / names[i - i % 1000], path)
        else:  # once in each folder, as file systems bound the links to a file
            path.parent.mkdir(parents=True)
            image.save(path)
    centres = draw.normal(size=(100, 64))[draw.integers(100, size=count)]
    features = (centres + draw.normal(size=centres.shape)).astype(np.float32)
    np.savez(out / "features.npz", names=np.array(names), features=features)
    return out / "features.npz"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return Markdown."""
    head = "| features | same class among 12 neighbours |"
    lines = [head + "".join(f" NMI, {k} clusters |" for k in CLUSTERS) + " seconds | CPU seconds |"]
    lines.append("| --- |" + " ---: |" * (3 + len(CLUSTERS)))
    for name, row in results.items():
        cells = [f"{100 * row['same_class_of_12']:.1f} %"]
        cells += [f"{row['nmi'][k]:.3f}" for k in CLUSTERS]
        cells += [f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("folder", type=Path, nargs="?", help="images in a subfolder per class")
    source.add_argument("--photographs", type=int, metavar="N", help="files of 12 megapixels")
    source.add_argument("--many", type=int, metavar="N", help="files, and features of them")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows")
    parser.add_argument("--keep", type=Path, help="folder of the pages (default: none)")
    parser.add_argument("--out", type=Path, help="folder of explore_….json and .md")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    kind = "photographs" if args.photographs else "many" if args.many else None
    name = f"explore_{kind}" if kind else "explore"
    stored = None if args.out is None else args.out / f"{name}.json"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        keep = args.keep or Path(scratch) / "pages"
        if args.photographs:
            folder = Path(scratch) / "photographs"
            folder.mkdir()
            write_photographs(args.photographs, folder)
            results = {"EfficientNet-Lite0": explore(folder, keep / "photographs")}
        elif args.many:
            features = str(write_many(args.many, Path(scratch)))
            row = explore(Path(scratch) / "images", keep / "many", "--features", features)
            results = {"64 features": row}
        else:
            if stored is not None and stored.exists():
                results = json.loads(stored.read_text(encoding="utf-8"))["results"]
            for row in args.only:
                options = ROWS[row]
                if row == "pixels":
                    (keep / "raw").mkdir(parents=True, exist_ok=True)
                    options = ("--features", str(pixels(args.folder, keep / "raw")))
                out = keep / row.replace(" ", "-").lower()
                again = (*options, "--labels", "folders", "--clusters", *CLUSTERS)
                seconds = explore(args.folder, out, *again)
                results[row] = {**seconds, **scores(out)}
            results = {row: results[row] for row in ROWS if row in results}
    settings = {
        "images": args.photographs or args.many or args.folder.name,
        "hardware": processor(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": load,
    }
    text = json.dumps({"settings": settings, "results": results}, indent=1)
    print(text)
    if stored is not None:
        stored.write_text(text + "\n", encoding="utf-8")
        if kind is None:
            stored.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
