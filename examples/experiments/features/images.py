"""Images to extract features from: a folder, a file of packed JPEGs, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Pictures:
    """Images that are decoded when asked for.

    Attributes:
        read: from a number to that image, RGB.
        labels: (n,), int64; -1 where there are none.
        name: what to call them in a table.
        source: a digest that differs for other images.
        rows: (n,), their numbers in that source.
    """

    read: Callable[[int], Image.Image]
    labels: npt.NDArray[np.int64]
    name: str
    source: str
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Pictures:
        """Return those images, in that order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            read=partial(_renumbered, self.read, chosen),
            labels=self.labels[chosen],
            rows=self.rows[chosen],
        )

    def fingerprint(self, start: int = 0, stop: int | None = None) -> str:
        """Return a digest of which images those from `start` to `stop` are."""
        digest = hashlib.sha256(self.source.encode() + self.rows[start:stop].tobytes())
        return digest.hexdigest()[:16]


def load(source: str) -> Pictures:
    """Return the images of a folder, a packed file or `digits`.

    Args:
        source: a folder, whose subfolders are classes if it has any; an .npz with the arrays
            `jpeg` (all files, one after another), `offsets` (n + 1 file boundaries) and `labels`;
            or `digits`, scikit-learn's.

    Raises:
        ValueError: no such source, or one without images.
    """
    path = Path(source)
    if source == "digits":
        return _digits()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _packed(path)
    raise ValueError(f"images: expected a folder, an .npz of JPEGs or 'digits', got {source!r}")


# Functions of modules, as other processes take no closures.
def _renumbered(
    read: Callable[[int], Image.Image], rows: npt.NDArray[np.int64], i: int
) -> Image.Image:
    return read(int(rows[i]))


def _of_folder(files: Sequence[Path], i: int) -> Image.Image:
    return _rgb(files[i])


def _of_pack(jpeg: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], i: int) -> Image.Image:
    return _rgb(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))


def _of_pixels(pixels: npt.NDArray[np.uint8], i: int) -> Image.Image:
    return Image.fromarray(pixels[i]).convert("RGB")


def _rgb(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _folder(path: Path) -> Pictures:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"images: {path} holds no image ({', '.join(sorted(SUFFIXES))})")
    names = [f.relative_to(path).parts[0] if f.parent != path else "" for f in files]
    classes = sorted(set(names) - {""})
    numbers = {"": -1} | {name: i for i, name in enumerate(classes)}
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
    labels = np.array([numbers[name] for name in names], dtype=np.int64)
    source = digest.hexdigest()[:16]
    rows = np.arange(len(files), dtype=np.int64)
    return Pictures(partial(_of_folder, files), labels, path.name, source, rows)


def _packed(path: Path) -> Pictures:
    with np.load(path) as pack:
        missing = {"jpeg", "offsets", "labels"} - set(pack.files)
        if missing:
            raise ValueError(f"images: {path} lacks the arrays {', '.join(sorted(missing))}")
        jpeg, offsets, labels = pack["jpeg"], pack["offsets"], pack["labels"].astype(np.int64)
    digest = hashlib.sha256(jpeg.tobytes()).hexdigest()[:16]
    rows = np.arange(len(labels), dtype=np.int64)
    return Pictures(partial(_of_pack, jpeg, offsets), labels, path.stem, digest, rows)


def _digits() -> Pictures:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    rows = np.arange(len(labels), dtype=np.int64)
    return Pictures(partial(_of_pixels, pixels), labels, "digits", "scikit-learn-digits", rows)
