"""Find and read the images of a folder, whatever they are: pixels to train on and thumbnails."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, features
from tqdm import tqdm

from c2bin_ext._hosts import whole_file

# Pillow hands EPS to Ghostscript, which runs the file as a program.
Image.init()
_FORMATS = sorted(set(Image.OPEN) - {"EPS"})
_PART = 256
_SAMPLED = 200


class ExploreError(Exception):
    """Something the user can put right; the message says how."""


class Skipped(NamedTuple):
    """A file that is not in the page, and why."""

    path: str
    reason: str


class Images(NamedTuple):
    """What was read: n paths, pixels uint8 (n, 3, S, S), n encoded thumbnails, and the rest."""

    paths: list[str]
    pixels: npt.NDArray[np.uint8]
    thumbnails: list[bytes]
    skipped: list[Skipped]


def shown(path: str) -> str:
    r"""Return a path as text that any terminal, table and page can hold.

    Bytes that are no UTF-8, line breaks and other control characters become escapes.

    Examples:
        >>> print(shown("a\nb"))
        a\x0ab
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == "\u00ad" else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def find(folder: Path, exclude: Path) -> tuple[list[str], list[Skipped]]:
    """List the files below a folder, links followed, each folder once.

    Args:
        folder: Where to look.
        exclude: A folder to leave out: the output's.

    Returns:
        Paths relative to `folder`, sorted, and what was left out. Hidden files and folders (names
        that start with a dot) are left out.

    Raises:
        ExploreError: If `folder` is no folder or cannot be read.
    """
    if not folder.exists():
        raise ExploreError(f"there is no folder {shown(str(folder))}")
    if not folder.is_dir():
        raise ExploreError(f"{shown(str(folder))} is a file: give the folder that it is in")
    files: list[str] = []
    skipped: list[Skipped] = []
    # Folders reached by links come last, so that a folder keeps the path where it really lies.
    folders, links = [""], list[str]()
    seen: set[tuple[int, int]] = set()
    if exclude.is_dir():
        seen.add(_identity(exclude))
    while folders or links:
        relative = folders.pop() if folders else links.pop(0)
        try:
            own = _identity(folder / relative)
            if own in seen:
                if (folder / relative).is_symlink():
                    skipped.append(Skipped(relative, "link to a folder that is listed elsewhere"))
                continue
            seen.add(own)
            entries = sorted(os.scandir(folder / relative), key=lambda entry: entry.name)
        except OSError as error:
            if not relative:
                raise ExploreError(f"cannot read {shown(str(folder))}: {error.strerror}") from error
            skipped.append(Skipped(relative, f"folder cannot be read: {error.strerror}"))
            continue
        below = list[str]()
        for entry in entries:
            path = os.path.join(relative, entry.name)
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                skipped.append(Skipped(path, f"cannot be read: {error.strerror}"))
                continue
            if entry.name.startswith("."):
                skipped.append(Skipped(path, "hidden"))
            elif stat.S_ISDIR(mode):
                (links if entry.is_symlink() else below).append(path)
            elif stat.S_ISREG(mode):
                files.append(path)
            else:  # to open a pipe would wait for ever
                skipped.append(Skipped(path, "neither file nor folder"))
        folders += reversed(below)
    return sorted(files), skipped


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def typical_side(folder: Path, paths: Sequence[str]) -> float | None:
    """Return the median of the shorter sides, in px, of up to 200 images; None if none opens."""
    sides = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in paths[:: -(-len(paths) // _SAMPLED) or 1]:
            try:
                with Image.open(folder / path, formats=_FORMATS) as image:
                    sides.append(min(image.size))
            except Exception:  # Pillow's plugins raise what they like; it is reported on reading
                continue
    return float(np.median(sides)) if sides else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any image as RGB, upright, transparent parts white, deep grey scaled to 8 bits.

    Integer values are divided by the full scale of the smallest even number of bits that holds
    them, so that 10, 12 and 14 bits in a file of 16 do not come out black. Values that are negative
    or floating point are stretched from their smallest to their largest.

    Examples:
        >>> to_rgb(Image.new("CMYK", (2, 2), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> to_rgb(Image.new("I;16", (2, 2), 4095)).getpixel((0, 0))
        (255, 255, 255)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        if image.mode.startswith("I") and low >= 0:
            bits = max(8, int(high).bit_length())
            low, high = 0.0, float(2 ** (bits + bits % 2) - 1)
        scaled = (values - low) * (255 / (high - low) if high > low else 1)
        image = Image.fromarray(scaled.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def encode(image: Image.Image, side: int) -> bytes:
    """Return a thumbnail that fits into `side` × `side` px; small images are not enlarged."""
    thumbnail = image.copy()
    thumbnail.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    if features.check("webp"):
        thumbnail.save(file, "WEBP", quality=72)
    else:
        thumbnail.save(file, "JPEG", quality=72, optimize=True)
    return file.getvalue()


def _read(path: Path, size: int, side: int) -> tuple[npt.NDArray[np.uint8], bytes] | str:
    """Return pixels (size, size, 3) and a thumbnail, or why there are none."""
    try:
        if path.stat().st_size == 0:
            return "empty file"
        with Image.open(path, formats=_FORMATS) as image:
            # JPEG decodes to an eighth of its size many times faster; thumbnails need no more.
            image.draft(image.mode, (2 * max(size, side),) * 2)
            rgb = to_rgb(image)
        # Twice the training size is enough for the crop, and much faster on a long panorama.
        square = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(square, dtype=np.uint8), encode(rgb, side)
    except UnidentifiedImageError:
        return "not an image that Pillow reads"
    except MemoryError:
        return "too large for the memory"
    except Exception as error:  # plugins raise what they like; one bad file must not end the run
        return f"broken: {str(error) or type(error).__name__}"


def read_all(
    folder: Path,
    paths: Sequence[str],
    size: int,
    side: int,
    cache: Path,
    progress: Callable[..., Any] = tqdm,
) -> Images:
    """Read all files; parts that an earlier, interrupted run has read come from `cache`.

    Args:
        folder: Where `paths` start.
        paths: Relative paths of files, images or not.
        size: Training size S in px: images are scaled and cropped in the middle to S × S.
        side: Longest side of a thumbnail in px.
        cache: Folder for the parts.
        progress: What makes the progress bar, called like `tqdm`.

    Returns:
        The images that can be read, in the order of `paths`, and the files that cannot.
    """
    cache.mkdir(parents=True, exist_ok=True)
    kept: list[str] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    thumbnails: list[bytes] = []
    skipped: list[Skipped] = []
    # Once, around all threads: the filters belong to the process.
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(total=len(paths), desc="Reading images", unit="file") as bar,
    ):
        warnings.simplefilter("ignore")
        for start in range(0, len(paths), _PART):
            part = paths[start : start + _PART]
            file = cache / f"{fingerprint(folder, part, size, side)}.npz"
            if not file.exists():
                jobs = [pool.submit(_read, folder / path, size, side) for path in part]
                results = []
                try:
                    for job in jobs:
                        results.append(job.result())
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                _save_part(file, results, size)
            else:
                bar.update(len(part))
            with np.load(file) as stored:
                reasons = json.loads(str(stored["reasons"]))
                ends = stored["ends"].tolist()
                encoded = stored["encoded"].tobytes()
                pixels.append(stored["pixels"])
            thumbnails += [encoded[a:b] for a, b in itertools.pairwise([0, *ends])]
            kept += [path for path, reason in zip(part, reasons, strict=True) if not reason]
            skipped += [
                Skipped(p, reason) for p, reason in zip(part, reasons, strict=True) if reason
            ]
    stacked = np.concatenate(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return Images(kept, np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)), thumbnails, skipped)


def _save_part(
    file: Path, results: Sequence[tuple[npt.NDArray[np.uint8], bytes] | str], size: int
) -> None:
    good = [result for result in results if not isinstance(result, str)]
    encoded = b"".join(thumbnail for _, thumbnail in good)
    with whole_file(file) as part, part.open("wb") as stream:
        np.savez(
            stream,
            pixels=np.stack([p for p, _ in good])
            if good
            else np.zeros((0, size, size, 3), np.uint8),
            encoded=np.frombuffer(encoded, dtype=np.uint8),
            ends=np.cumsum([len(thumbnail) for _, thumbnail in good], dtype=np.int64),
            reasons=np.array(json.dumps([r if isinstance(r, str) else "" for r in results])),
        )


def fingerprint(folder: Path, paths: Sequence[str], *more: int) -> str:
    """Return a hash of the names, sizes and times of files: the same as long as none changed."""
    digest = hashlib.sha256(repr(more).encode())
    for path in paths:
        try:
            status = (folder / path).stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = (-1, -1)
        digest.update(os.fsencode(path) + repr(state).encode() + b"\0")
    return digest.hexdigest()


def fit_budget(
    thumbnails: list[bytes], side: int, budget: int, progress: Callable[..., Any] = tqdm
) -> list[bytes]:
    """Shrink all thumbnails alike until together they hold at most `budget` bytes.

    Examples:
        >>> file = encode(Image.effect_noise((64, 64), 90).convert("RGB"), 64)
        >>> sum(map(len, fit_budget([file, file], 64, budget=len(file)))) <= len(file)
        True
    """
    smallest = 8
    total = sum(map(len, thumbnails))
    while total > budget and side > smallest:
        side = max(smallest, min(side - 1, int(side * 0.95 * (budget / total) ** 0.5)))
        smaller = []
        for thumbnail in progress(thumbnails, desc=f"Thumbnails of {side} px", unit="image"):
            with Image.open(io.BytesIO(thumbnail)) as image:
                smaller.append(encode(image.convert("RGB"), side))
        thumbnails, total = smaller, sum(map(len, smaller))
    return thumbnails


def classes_of(paths: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return class names and labels (n,), where images lie in at least two first-level subfolders.

    Images that lie in no subfolder get the label -1. Without classes the list is empty.

    Examples:
        >>> classes_of(["b/1.png", "a/2.png", "3.png"])
        (['a', 'b'], array([ 1,  0, -1]))
        >>> classes_of(["a/1.png", "a/b/2.png"])[0]
        []
    """
    firsts = [path.split(os.sep)[0] if os.sep in path else None for path in paths]
    names = sorted({first for first in firsts if first is not None})
    if len(names) < 2:
        return [], np.full(len(paths), -1, dtype=np.int64)
    number = {name: i for i, name in enumerate(names)}
    labels = [-1 if first is None else number[first] for first in firsts]
    return names, np.array(labels, dtype=np.int64)
