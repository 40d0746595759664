"""Find and read the images of a folder, whatever they are: what a network sees, and thumbnails."""

from __future__ import annotations

import calendar
import hashlib
import io
import itertools
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, features

from c2bin_ext._hosts import whole_file

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF = False
else:
    register_heif_opener()
    HEIF = True

# Pillow hands EPS to Ghostscript, which runs the file as a program.
Image.init()
_FORMATS = sorted(set(Image.OPEN) - {"EPS"})
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"}
_PART = 256
_SAMPLED = 200
# An image of more pixels is refused: no camera makes it, and it would take over a gigabyte.
LARGEST = 2**28
# Pixels that all threads together hold at a time, but for one larger image: 4 bytes each.
_HELD = 2**26
_THREADS = 8
_AVERAGED = {"L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}

Array = npt.NDArray[Any]
# Makes rows (m, ...) of m squares, uint8 (m, S, S, 3).
Convert = Callable[[npt.NDArray[np.uint8]], Array]
# Is told how many files of how many are done.
Tell = Callable[[int, int], None]


class ExploreError(Exception):
    """Something the user can put right; the message says how."""


class Skipped(NamedTuple):
    """A file that is not in the page, and why."""

    path: str
    reason: str


class Reading(NamedTuple):
    """One image: what the network sees, uint8 (S, S, 3), a thumbnail, and what is known of it."""

    square: npt.NDArray[np.uint8]
    thumbnail: bytes
    taken: float
    light: float
    sharpness: float


class Images(NamedTuple):
    """What was read of n images, and the files that are none.

    Attributes:
        paths: Relative to the folder.
        rows: (n, ...), what became of their squares.
        thumbnails: Encoded files.
        taken: (n,), seconds since 1970 by the camera's clock, NaN without a date.
        light: (n,), mean luminance from 0 to 1.
        sharpness: (n,), variance of the Laplacian over that of the image.
        skipped: Files that are not in it.
    """

    paths: list[str]
    rows: Array
    thumbnails: list[bytes]
    taken: npt.NDArray[np.float64]
    light: npt.NDArray[np.float64]
    sharpness: npt.NDArray[np.float64]
    skipped: list[Skipped]


def shown(path: str) -> str:
    r"""Return a path as text that any terminal, table and page can hold; `parsed` is its inverse.

    Folders are separated by "/". Bytes that are no UTF-8, line breaks, other control characters and
    backslashes become escapes.

    Examples:
        >>> print(shown("a\nb"))
        a\x0ab
    """
    raw = os.fsencode(path.replace(os.sep, "/")).replace(b"\\", b"\\\\")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == "\u00ad" else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 128:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def parsed(text: str) -> str:
    r"""Return the path that `shown` made a text of.

    Examples:
        >>> parsed(shown("a\nb")) == "a\nb"
        True
    """

    def plain(match: re.Match[str]) -> str:
        if match[0] == "\\\\":
            return "\\"
        code = int(match[0][2:], 16)
        return os.fsdecode(bytes([code])) if match[0][1] == "x" else chr(code)

    escapes = r"\\\\|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}"
    return re.sub(escapes, plain, text).replace("/", os.sep)


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


@contextmanager
def _reading() -> Iterator[None]:
    """Set what Pillow keeps for the whole process: quiet, and refusing only what is too large."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = LARGEST // 2  # it refuses what has over twice as many
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def typical_side(folder: Path, paths: Sequence[str]) -> float | None:
    """Return the median of the shorter sides, in px, of up to 200 images; None if none opens."""
    sides = []
    with _reading():
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


class _Room:
    """Lets images in while together they hold at most so many pixels; a larger one goes alone."""

    def __init__(self, pixels: int) -> None:
        self.pixels = self.free = pixels
        self.changed = threading.Condition()

    @contextmanager
    def __call__(self, pixels: int) -> Iterator[None]:
        wanted = min(pixels, self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= wanted)
            self.free -= wanted
        try:
            yield
        finally:
            with self.changed:
                self.free += wanted
                self.changed.notify_all()


_room = _Room(_HELD)


def _taken(image: Image.Image) -> float:
    """Return when the photograph was taken, NaN if it does not say so."""
    try:
        exif = image.getexif()
        text = exif.get_ifd(0x8769).get(0x9003) or exif.get(0x0132)
        return float(calendar.timegm(time.strptime(str(text)[:19], "%Y:%m:%d %H:%M:%S")))
    except Exception:  # many cameras write what no specification knows
        return float("nan")


def _shrunk(image: Image.Image, least: int) -> Image.Image:
    """Return the image at a whole fraction of its size, the shorter side `least` px or more."""
    factor = min(image.size) // least
    if factor < 2:
        return image
    if image.mode in _AVERAGED:
        return image.reduce(factor)
    return image.resize((image.width // factor, image.height // factor), Image.Resampling.NEAREST)


def _sharpness(rgb: Image.Image) -> float:
    """Return the variance of the Laplacian over that of the image, at 512 px."""
    small = rgb.convert("L")
    small.thumbnail((512, 512))
    grey = np.asarray(small, dtype=np.float32)
    if min(grey.shape) < 3 or grey.var() < 1:
        return 0.0
    edges = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2]
    return float((edges - grey[1:-1, 2:]).var() / grey.var())


def _read(path: Path, size: int, crop: float, resampling: str, side: int) -> Reading | str:
    """Return an image, or why there is none."""
    try:
        if path.stat().st_size == 0:
            return "empty file"
        with Image.open(path, formats=_FORMATS) as image:
            whole = image.width * image.height
            # JPEG decodes to an eighth of its size many times faster; thumbnails need no more.
            image.draft(image.mode, (max(size, side),) * 2)
            if not image.info.get("progressive"):  # of these the decoder holds all pixels
                whole = image.width * image.height
            with _room(whole):
                rgb = to_rgb(_shrunk(image, max(size, side)))
                taken = _taken(image)
        # The middle that the network's own preprocessing crops.
        method = Image.Resampling[resampling]
        square = ImageOps.fit(rgb, (size, size), method, bleed=(1 - crop) / 2)
        return Reading(
            np.asarray(square, dtype=np.uint8),
            encode(rgb, side),
            taken,
            float(np.asarray(rgb.convert("L").reduce(max(1, min(rgb.size) // 32))).mean() / 255),
            _sharpness(rgb),
        )
    except UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and not HEIF:
            return "needs pillow-heif: pip install pillow-heif"
        return "not an image that Pillow reads"
    except Image.DecompressionBombError:
        return f"too large: over {LARGEST // 10**6} megapixels"
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
    *,
    crop: float = 1.0,
    resampling: str = "BICUBIC",
    convert: Convert = np.asarray,
    tell: Tell = lambda done, total: None,
) -> Images:
    """Read all files; what an earlier run has read, and no change of a file undid, is in `cache`.

    Args:
        folder: Where `paths` start.
        paths: Relative paths of files, images or not.
        size: Side S of the squares in px: images are scaled and cropped in the middle to S × S.
        side: Longest side of a thumbnail in px.
        cache: Folder for what was read; another one for other sizes and conversions.
        crop: Share of the shorter side that the square takes.
        resampling: How squares are scaled, by Pillow's name.
        convert: Makes rows of squares, which themselves are not kept.
        tell: Is told of progress.

    Returns:
        The images that can be read, in the order of `paths`, and the files that cannot.
    """
    keys = [fingerprint(folder, [path]) for path in paths]
    found, skipped = _cached(cache, set(keys)), list[Skipped]()
    new = [(path, key) for path, key in zip(paths, keys, strict=True) if key not in found]
    parts = [new[start : start + _PART] for start in range(0, len(new), _PART)]
    done = len(paths) - len(new)
    tell(done, len(paths))
    with _reading(), ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:

        def submitted(part: list[tuple[str, str]]) -> list[Future[Reading | str]]:
            return [
                pool.submit(_read, folder / path, size, crop, resampling, side) for path, _ in part
            ]

        try:
            jobs = submitted(parts[0]) if parts else []
            for number, part in enumerate(parts):
                results = [job.result() for job in jobs]
                # The next part is read while this one is converted.
                jobs = submitted(parts[number + 1]) if number + 1 < len(parts) else []
                good = [
                    (key, result)
                    for (_, key), result in zip(part, results, strict=True)
                    if isinstance(result, Reading)
                ]
                skipped += [
                    Skipped(path, result)
                    for (path, _), result in zip(part, results, strict=True)
                    if isinstance(result, str)
                ]
                if good:
                    found |= _keep(cache, good, convert)
                done += len(part)
                tell(done, len(paths))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    kept = [(path, found[key]) for path, key in zip(paths, keys, strict=True) if key in found]
    known = np.array([entry[2] for _, entry in kept]).reshape(len(kept), 3).T
    return Images(
        [path for path, _ in kept],
        np.stack([entry[0] for _, entry in kept]) if kept else np.zeros((0, 1)),
        [entry[1] for _, entry in kept],
        known[0],
        known[1],
        known[2],
        skipped,
    )


_Entry = tuple[Array, bytes, Array]


def _keep(cache: Path, good: Sequence[tuple[str, Reading]], convert: Convert) -> dict[str, _Entry]:
    """Convert and write a part; return its entries by key."""
    keys = [key for key, _ in good]
    encoded = [reading.thumbnail for _, reading in good]
    rows = convert(np.stack([reading.square for _, reading in good]))
    known = np.array([reading[2:] for _, reading in good], dtype=np.float64)
    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
    with whole_file(cache / f"{name}.npz") as part, part.open("wb") as stream:
        np.savez(
            stream,
            keys=np.array(keys),
            rows=rows,
            encoded=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            ends=np.cumsum([len(file) for file in encoded], dtype=np.int64),
            known=known,
        )
    return dict(zip(keys, zip(rows, encoded, known, strict=True), strict=True))


def _cached(cache: Path, wanted: set[str]) -> dict[str, _Entry]:
    """Return what is kept of the wanted files; a damaged part is set aside."""
    found: dict[str, _Entry] = {}
    for file in sorted(cache.glob("*.npz")):
        try:
            with file.open("rb") as stream, np.load(stream) as stored:
                part = {name: stored[name] for name in stored.files}
            data, ends = part["encoded"].tobytes(), part["ends"].tolist()
            encoded = [data[a:b] for a, b in itertools.pairwise([0, *ends])]
            entries = zip(part["rows"], encoded, part["known"], strict=True)
            own = dict(zip(part["keys"].tolist(), entries, strict=True))
        except Exception:  # whatever a cut file makes numpy raise
            print(f"{shown(str(set_aside(file)))}: damaged, set aside; its images are read again")
            continue
        found |= {key: entry for key, entry in own.items() if key in wanted}
    return found


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to a name that nothing reads; return the new path."""
    names = (path.with_name(f"{path.name}.damaged{i or ''}") for i in itertools.count())
    free = next(name for name in names if not name.exists())
    return path.rename(free)


def fingerprint(folder: Path, paths: Sequence[str]) -> str:
    """Return a hash of the names, sizes and times of files: the same as long as none changed."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = (folder / path).stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = (-1, -1)
        digest.update(os.fsencode(path) + repr(state).encode() + b"\0")
    return digest.hexdigest()


def fit_budget(
    thumbnails: list[bytes], side: int, budget: int, tell: Tell = lambda done, total: None
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
        for number, thumbnail in enumerate(thumbnails):
            tell(number, len(thumbnails))
            with Image.open(io.BytesIO(thumbnail)) as image:
                smaller.append(encode(image.convert("RGB"), side))
        thumbnails, total = smaller, sum(map(len, smaller))
    return thumbnails


# Such as 2019, 2019-08 Rome, 100APPLE and DCIM: when and by what, not what is in the picture.
_NO_CLASS = re.compile(r"(19|20)\d\d|^\d{3}[A-Z_]{5}$|^DCIM$|^\d+$", re.ASCII)
_LEAST_OF_CLASS = 5


def classes_of(
    paths: Sequence[str], labels: str = "auto"
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return class names and labels (n,); without classes the list is empty.

    Args:
        paths: Relative paths of images.
        labels: `"folders"`: where there are at least two first-level subfolders, each is a class.
            `"auto"`: only if these look like classes: no image lies deeper, their names are no
            dates or numbers, and each holds five images or more on average. `"none"`: no classes.

    Returns:
        Images that lie in no subfolder get the label -1.

    Examples:
        >>> classes_of(["b/1.png", "a/2.png", "3.png"], "folders")
        (['a', 'b'], array([ 1,  0, -1]))
        >>> classes_of([f"{folder}/{i}.png" for folder in "ab" for i in range(5)])[0]
        ['a', 'b']
        >>> classes_of([f"{year}/{i}.png" for year in (2019, 2020) for i in range(5)])[0]
        []
    """
    parts = [path.split(os.sep) for path in paths]
    names = sorted({part[0] for part in parts if len(part) > 1})
    none = list[str](), np.full(len(paths), -1, dtype=np.int64)
    if len(names) < 2 or labels == "none":
        return none
    like_classes = (
        max(map(len, parts)) == 2
        and len(paths) >= _LEAST_OF_CLASS * len(names)
        and not any(_NO_CLASS.search(name) for name in names)
    )
    if labels == "auto" and not like_classes:
        return none
    number = {name: i for i, name in enumerate(names)}
    found = [number[part[0]] if len(part) > 1 else -1 for part in parts]
    return names, np.array(found, dtype=np.int64)
