"""One HTML file that opens from disk: the template, filled with data and thumbnails."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import numpy.typing as npt

from c2bin_explore.analysis import Clusters, Result
from c2bin_explore.images import Images, Skipped, Tell, fit_budget, shown

# Of 60 MB for the whole page: base64 makes four bytes of three, and names, neighbours and positions
# of 20,000 images take about 5 MB.
THUMBNAIL_BUDGET = 36_000_000
# Of more images the thumbnails are files beside the page.
LARGEST_PAGE = 20_000
_SIDES, _SIDE_OF_FILES = (320, 224, 160, 112, 94), 160
_BYTES_PER_PIXEL = 0.2
_CHUNK = 128
THUMBNAILS = "index-thumbnails"
_FOLDER = 1000
_LISTED = 1000
# What the first screen shows of each coarse cluster comes first, to be there when it is drawn.
_FIRST = 12


def thumbnail_side(images: int) -> int:
    """Return the longest side in px of the thumbnails of n images.

    It is one of a few, so that some more images do not need all thumbnails anew.

    Examples:
        >>> [thumbnail_side(n) for n in (400, 3_000, 5_000, 20_000, 100_000)]
        [320, 224, 160, 94, 160]
    """
    if images > LARGEST_PAGE:
        return _SIDE_OF_FILES
    fits = (s for s in _SIDES if images * s * s * _BYTES_PER_PIXEL <= THUMBNAIL_BUDGET)
    return next(fits, _SIDES[-1])


def relative_link(target: Path, start: Path) -> str:
    """Return the percent-encoded link from a page in `start` to a file, "" across Windows drives.

    Examples:
        >>> relative_link(Path("photos/Ä 1#.jpg"), Path("photos"))
        '%C3%84%201%23.jpg'
    """
    try:
        path = os.path.relpath(target.resolve(), start.resolve())
    except ValueError:
        return ""
    link = quote_from_bytes(os.fsencode(path.replace(os.sep, "/")))
    # A first segment with a colon would be read as a scheme.
    return "./" + link if "%3A" in link.split("/")[0] else link


def write(
    out: Path,
    result: Result,
    images: Images,
    skipped: Sequence[Skipped],
    about: Mapping[str, str],
    *,
    title: str,
    link: str = "",
    note: str = "",
    tell: Tell = lambda done, total: None,
) -> None:
    """Write the page, `index.html`, and the folder `index-thumbnails` if there are many.

    Args:
        out: Folder to write to.
        result: What to show of n images.
        images: Their files, thumbnails and dates.
        skipped: Files that are not in it.
        about: Name and value of everything that a reader should know about the run.
        title: Name of the folder.
        link: Link from the page to the folder; "" for none.
        note: What stands at the top of the first screen.
        tell: Is told of progress.
    """
    order, thumbnails = _order(result.scales[0]), images.thumbnails
    single = len(order) <= LARGEST_PAGE
    if single:
        side = thumbnail_side(len(order))
        thumbnails = fit_budget(thumbnails, side, THUMBNAIL_BUDGET, tell)
    place = np.empty(len(order), dtype=np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    data = {
        "title": title,
        "note": note,
        "link": link,
        "names": result.names,
        # Only of names that are shown with escapes; the page makes the others of the names.
        "links": {
            i: quote_from_bytes(os.fsencode(path.replace(os.sep, "/")))
            for i, path in enumerate(images.paths)
            if path.replace(os.sep, "/") != result.names[i]
        },
        "classes": result.classes,
        "labels": packed(result.labels, "<i4"),
        "scales": [
            {
                "count": scale.count,
                "scores": scale.scores,
                "cluster": packed(scale.cluster, "<u2"),
                "certainty": packed(scale.certainty, "<f4"),
            }
            for scale in result.scales
        ],
        "neighbourCount": result.neighbours.shape[1],
        "neighbours": packed(result.neighbours, "<u4"),
        "cosines": packed(result.cosines, "<f4"),
        "positions": packed(result.positions, "<f4"),
        "taken": packed(images.taken, "<f8"),
        "light": packed(images.light, "<f4"),
        "sharpness": packed(images.sharpness, "<f4"),
        "mapMethod": result.map_method,
        "place": packed(place, "<u4"),
        "chunk": _CHUNK if single else 0,
        "folder": _FOLDER,
        "suffix": _kind(thumbnails[0]),
        "settings": dict(about),
        "skippedCount": len(skipped),
        "skipped": [[shown(path), shown(reason)] for path, reason in skipped[:_LISTED]],
    }
    chunks = []
    if single:
        for start in range(0, len(order), _CHUNK):
            urls = [_data_url(thumbnails[i]) for i in order[start : start + _CHUNK]]
            name = f"thumbnails-{start // _CHUNK}"
            chunks.append(f'<script type="application/json" id="{name}">{_json(urls)}</script>\n')
    else:
        for i, file in enumerate(thumbnails):
            tell(i, len(thumbnails))
            folder = out / THUMBNAILS / str(i // _FOLDER)
            if i % _FOLDER == 0:
                folder.mkdir(parents=True)
            (folder / f"{i}.{_kind(file)}").write_bytes(file)
    style, script = (_template(f"page.{kind}") for kind in ("css", "js"))
    filled = {
        # Images: thumbnails, and originals, which lie beside the page or elsewhere on the disk.
        "csp": f"default-src 'none'; img-src data: 'self' file:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'",
        "title": html.escape(title),
        "count": f"{len(result.names):,}",
        "style": style,
        "data": _json(data),
        "script": script,
        "thumbnails": "".join(chunks),
    }
    # In one pass: what is filled in is never searched for placeholders.
    text = re.sub(r"\{\{(\w+)\}\}", lambda m: filled[m[1]], _template("page.html"))
    (out / "index.html").write_text(text, encoding="utf-8", newline="\n")


def packed(values: npt.NDArray[Any], dtype: str) -> str:
    """Return an array as base64 of little-endian numbers, row after row."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def _order(coarse: Clusters) -> npt.NDArray[np.int64]:
    """Return image numbers in the order of their thumbnails: what is seen first comes first."""
    order = np.lexsort((-coarse.certainty, coarse.cluster))
    sizes = np.bincount(coarse.cluster, minlength=coarse.count)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.concatenate([order[rank < _FIRST], order[rank >= _FIRST]])


def _kind(image: bytes) -> str:
    return "webp" if image[:4] == b"RIFF" else "jpeg"


def _data_url(image: bytes) -> str:
    return f"data:image/{_kind(image)};base64,{base64.b64encode(image).decode('ascii')}"


def _json(value: Any) -> str:
    # "</script>" or "<!--" in a file name must not end the element.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _template(name: str) -> str:
    return (files("c2bin_explore") / name).read_text(encoding="utf-8")
