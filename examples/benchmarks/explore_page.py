"""Size and speed of the page that c2bin-explore writes, in headless Chromium.

    python examples/benchmarks/explore_page.py FOLDER [--mosaic 3] [--images 20000]

Of more than 2,000 images, 2,000 are read and shown again and again. With --mosaic N each is N × N
images of FOLDER, drawn at random: small images alone make small thumbnails, and these have more
detail than photographs of their size.

The thumbnails are of FOLDER's own images; clusters, neighbours and the map are drawn at random,
which matters neither for size nor for speed. Needs chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _chromium import Browser, missing
from c2bin_explore import analysis
from c2bin_explore import images as files
from c2bin_explore import page as pages
from PIL import Image

# Milliseconds since navigation began: first text, the first screen complete with thumbnails, all
# of the file parsed.
READ = 2_000
TIMES = """
const paint = performance.getEntriesByName("first-contentful-paint")[0];
return {paint: paint && paint.startTime, loaded: performance.timing.loadEventEnd -
  performance.timing.navigationStart, heap: performance.memory.usedJSHeapSize};
"""
PICTURES = """[...document.querySelectorAll("main img")].filter(image => {
  const box = image.getBoundingClientRect();
  return box.top < innerHeight && box.bottom > 0;
}).every(image => !image.src.startsWith("data:image/gif") && image.complete && image.naturalWidth)
&& performance.now()"""


def write_mosaics(folder: Path, count: int, edge: int, tiles: int, out: Path) -> None:
    """Write `count` JPEG files of tiles × tiles images, each scaled to `edge` px."""
    paths, _ = files.find(folder, exclude=out)
    draw = random.Random(0)
    out.mkdir(parents=True)
    for number in range(count):
        mosaic = Image.new("RGB", (edge * tiles, edge * tiles))
        for place in range(tiles * tiles):
            with Image.open(folder / draw.choice(paths)) as image:
                tile = image.convert("RGB").resize((edge, edge))
            mosaic.paste(tile, (place % tiles * edge, place // tiles * edge))
        mosaic.save(out / f"mosaic {number:05}.jpg", quality=92)


def write_page(folder: Path, count: int, out: Path) -> tuple[Path, int]:
    """Return the page and the number of images, those that are read again and again."""
    paths, _ = files.find(folder, exclude=out)
    read = files.read_all(folder, paths[:READ], 8, pages.thumbnail_side(count), out / "cache")
    draw, n = np.random.default_rng(0), count
    again = np.arange(n) % len(read.paths)
    images = files.Images(
        [f"{i:06} {read.paths[again[i]]}" for i in range(n)],
        read.rows[again],
        [read.thumbnails[i] for i in again],
        read.taken[again],
        read.light[again],
        read.sharpness[again],
        [],
    )
    result = analysis.Result(
        names=[files.shown(path) for path in images.paths],
        labels=np.full(n, -1),
        classes=[],
        scales=[
            analysis.Clusters(
                k,
                draw.integers(k, size=n),
                draw.random(n, np.float32),
                {"in_use": k, "effective": k},
            )
            for k in (10, 30, 90, 270)
        ],
        neighbours=draw.integers(n, size=(n, analysis.NEIGHBOURS)),
        cosines=np.sort(draw.random((n, analysis.NEIGHBOURS), np.float32))[:, ::-1],
        positions=draw.random((n, 2), np.float32),
        map_method="at random",
    )
    pages.write(out, result, images, [], {}, title="page")
    return out / "index.html", n


def measure(page: Path, rounds: int, profile: Path) -> dict[str, Any]:
    """Return medians over rounds, each in a new browser."""
    rows = []
    for i in range(rounds):
        with Browser(profile / str(i)) as browser:
            browser.open(page)
            pictures = browser.wait(PICTURES)
            row = {**browser.run(TIMES), "pictures": pictures}
            began = time.perf_counter()
            browser.run("location.hash = '#/map'")
            browser.wait('document.querySelector("canvas")?.dataset.visible > 0')
            row["map"] = 1000 * (time.perf_counter() - began)
            began = time.perf_counter()
            browser.run("location.hash = '#/search/1'")
            browser.wait('document.querySelector("main").dataset.view === "search"')
            row["search"] = 1000 * (time.perf_counter() - began)
            rows.append(row)
    return {
        name: {
            "median": round(statistics.median(row[name] for row in rows)),
            "largest": round(max(row[name] for row in rows)),
        }
        for name in rows[0]
    }


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mosaic", type=int, default=1, help="tiles along an edge of an image")
    parser.add_argument("--keep", type=Path, help="folder for the page; by default it is deleted")
    parser.add_argument("--out", type=Path, help="folder for explore_page.json")
    args = parser.parse_args()
    if advice := missing():
        parser.error(advice)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.keep or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        folder = args.folder
        if args.mosaic > 1:
            folder = Path(scratch) / "mosaics"
            write_mosaics(args.folder, min(args.images, READ), 32, args.mosaic, folder)
        page, images = write_page(folder, args.images, out)
        result: dict[str, Any] = {
            "images": images,
            "tiles_per_image": args.mosaic**2,
            "page_bytes": page.stat().st_size,
            "thumbnail_bytes": sum(
                file.stat().st_size for file in out.rglob("index-thumbnails/*/*")
            ),
            "rounds": args.rounds,
            "cores": os.cpu_count(),
            "milliseconds": measure(page, args.rounds, Path(scratch)),
        }
    result["heap_bytes"] = result["milliseconds"].pop("heap")
    print(json.dumps(result, indent=2))
    if args.out is not None:
        (args.out / "explore_page.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
