"""Images: read once, checked, made RGB, resized, and kept as uint8 tensors."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from experiments.store import ExperimentError

TORCHVISION = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
    "fashion-mnist": datasets.FashionMNIST,
}
IMAGE_SIZE = {"digits": 16, "stl10": 64}  # every other source: 32
TEST_SHARE = 0.2  # of a source that has no test images of its own


@dataclass
class Images:
    """Images uint8 (n, 3, S, S) and labels int64 (n,), for training and for testing."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]
    source: str
    notes: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.train.shape[-1]

    def fingerprint(self) -> str:
        """Return a digest of every pixel and label: results of different images never mix."""
        digest = hashlib.sha256("/".join(self.classes).encode())
        for tensor in (self.train, self.train_labels, self.test, self.test_labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB: transparency over white, 16-bit greys scaled to 8."""
    if image.mode == "RGB":
        return image
    if image.mode[0] in "IF":
        grey = np.asarray(image, dtype=np.float64)
        # Greys above 255 can only be 16-bit ones; Pillow would cut them off.
        grey = grey * (255 / 65535) if grey.max(initial=0) > 255 else grey
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def as_square(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image as RGB, scaled to `size` × `size` pixels."""
    image = as_rgb(image)
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def as_tensor(images: list[Image.Image]) -> Tensor:
    """Return RGB images of one size as uint8 (n, 3, S, S)."""
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def stratified(labels: Tensor, n: int) -> list[int]:
    """Return the indices of at most n images: every class in proportion and at least once, always
    the same ones.

    With n smaller than the number of images, at least one image of every class that has two is left
    over.
    """
    classes, counts = labels.unique(return_counts=True)
    spare = len(labels) - len(classes)
    quotas = [(n - len(classes)) * (int(count) - 1) / spare for count in counts]
    takes = [1 + int(quota) for quota in quotas]
    for c in sorted(range(len(takes)), key=lambda c: int(quotas[c]) - quotas[c]):
        if sum(takes) < n and takes[c] + 1 < counts[c]:
            takes[c] += 1
    shuffle = torch.Generator().manual_seed(0)
    chosen: list[int] = []
    for label, count, take in zip(classes.tolist(), counts.tolist(), takes, strict=True):
        rows = (labels == label).nonzero().flatten()
        chosen += rows[torch.randperm(count, generator=shuffle)[:take]].tolist()
    return sorted(chosen)


def held_out(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return a training part and a test part: TEST_SHARE of the images, at least one a class."""
    test = stratified(labels, max(len(labels.unique()), round(TEST_SHARE * len(labels))))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[test] = True
    return [(images[~mask], labels[~mask]), (images[mask], labels[mask])]


def digits(size: int) -> Images:
    """Return scikit-learn's 1,797 handwritten digits, 8 × 8 scans scaled up, split 80 to 20."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    images = as_tensor([as_square(Image.fromarray(p), size) for p in pixels])
    labels = torch.from_numpy(bunch.target).long()
    train, test = held_out(images, labels)
    note = f"digits: split {len(train[1])} train, {len(test[1])} test, stratified, always alike"
    return Images(*train, *test, [str(c) for c in range(10)], "scikit-learn digits", [note])


def from_torchvision(name: str, root: Path, size: int) -> Images:
    """Return a torchvision data set with its own split, downloaded if `root` lacks it."""
    kind = TORCHVISION[name]
    parts: list[tuple[Tensor, Tensor]] = []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
        try:
            data = kind(str(root), download=True, **which)
        except (OSError, RuntimeError, EOFError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ExperimentError(
                f"cannot get {name} into {root}: {reason}. Put torchvision's files for it there "
                "yourself, use --data FOLDER, or run without --dataset for the bundled digits."
            ) from error
        classes = list(data.classes)
        images = [
            as_square(data[i][0], size)
            for i in tqdm(range(len(data)), f"reading {name}", disable=None)
        ]
        labels = data.labels if name == "stl10" else data.targets
        parts.append((as_tensor(images), torch.as_tensor(labels).long()))
    return Images(*parts[0], *parts[1], classes, name)


def from_folder(folder: Path, size: int, skip_corrupt: bool) -> Images:
    """Return the images of FOLDER/{train,test or val}/<class>/, or of FOLDER/<class>/, split."""
    try:
        if not folder.exists():
            raise ExperimentError(f"{folder} does not exist")
        if not folder.is_dir():
            raise ExperimentError(f"{folder} is a file; --data takes a folder of class folders")
        scored = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        if (folder / "train").is_dir():
            parts = [folder / "train"] + ([scored] if scored else [])
        elif scored is not None:
            raise ExperimentError(f"{folder} has {scored.name}/ but no train/")
        else:
            parts = [folder]
        found = [_list(part) for part in parts]
    except PermissionError as error:
        raise ExperimentError(f"cannot read {error.filename}: permission denied") from error
    classes = sorted(found[0])
    if len(parts) == 2 and sorted(found[1]) != classes:
        odd = sorted(set(classes) ^ set(found[1]))
        raise ExperimentError(
            f"{parts[0]} and {parts[1]} must have the same class folders; only one has: "
            f"{', '.join(odd)}"
        )

    corrupt: list[str] = []
    read: list[tuple[list[Image.Image], Tensor]] = []
    total = sum(len(paths) for part in found for paths in part.values())
    with tqdm(total=total, desc="reading images", disable=None) as bar:
        for part in found:
            images: list[Image.Image] = []
            labels: list[int] = []
            for label, name in enumerate(classes):
                for path in part[name]:
                    bar.update()
                    try:
                        with Image.open(path) as image:
                            image.load()  # an image that needs no change would stay unread
                            images.append(as_square(image, size))
                        labels.append(label)
                    except PermissionError as error:
                        raise ExperimentError(f"cannot read {path}: permission denied") from error
                    # Pillow's decoders raise nearly anything on broken bytes (OSError, SyntaxError,
                    # struct.error, …).
                    except Exception:
                        corrupt.append(str(path.relative_to(folder)))
            read.append((images, torch.tensor(labels)))
    if corrupt:
        text = f"{len(corrupt)} of {total} images in {folder} are unreadable: {listed(corrupt)}"
        if not skip_corrupt:
            raise ExperimentError(
                f"{text}. Mend or remove them, or leave them out with --skip-corrupt."
            )
        for where, (_, labels_read) in zip(parts, read, strict=True):
            counts = labels_read.bincount(minlength=len(classes)).tolist()
            for name, count in zip(classes, counts, strict=True):
                if count < 2:
                    raise ExperimentError(
                        f"{text}. Without them {where / name} has {count} images; a class needs 2."
                    )
    tensors = [(as_tensor(images), labels) for images, labels in read]
    notes = [f"left out, unreadable: {listed(corrupt)}"] if corrupt else []
    if len(tensors) == 1:
        tensors = held_out(*tensors[0])
        sizes = f"{len(tensors[0][1])} train, {len(tensors[1][1])} test"
        notes.append(
            f"{parts[0]} has no test images of its own: split {sizes}, stratified, always alike"
        )
    return Images(*tensors[0], *tensors[1], classes, str(folder), notes, corrupt)


def _list(part: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder of `part`."""
    folders = sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ExperimentError(f"{part} has no class folders: expected {part}/<class>/<image>")
    files = {f.name: _images_below(f) for f in folders}
    for name, paths in files.items():
        if len(paths) < 2:
            what = "no images" if not paths else f"a single image ({paths[0].name})"
            raise ExperimentError(
                f"class folder {part / name} has {what}; a class needs at least 2"
            )
    if len(files) < 2:
        raise ExperimentError(
            f"{part} has a single class folder, {folders[0].name}; expected at least 2 classes"
        )
    return files


def _images_below(folder: Path) -> list[Path]:
    # Path.rglob says nothing of folders that it may not read. Broken links stay in the list: their
    # images cannot be read, and are counted and named with those that are corrupt.
    return sorted(
        Path(root, name)
        for root, _, names in os.walk(folder, onerror=_complain)
        for name in names
        if Path(name).suffix.lower() in IMG_EXTENSIONS
    )


def counted(part: Path) -> dict[str, int]:
    """Return the number of image files in each class folder of `part`."""
    folders = sorted(path for path in part.iterdir() if path.is_dir())
    return {folder.name: len(_images_below(folder)) for folder in folders}


def _complain(error: OSError) -> None:
    raise error


def listed(names: list[str], most: int = 10) -> str:
    """Return up to `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def limited(images: Images, limits: dict[str, int | None]) -> Images:
    """Return at most `limits["train"]` and `limits["test"]` images, stratified, always alike."""
    for part, limit in limits.items():
        labels: Tensor = getattr(images, f"{part}_labels")
        if limit is None or limit >= len(labels):
            continue
        if limit < len(images.classes):
            raise ExperimentError(
                f"{limit} {part} images are fewer than {len(images.classes)} classes"
            )
        keep = stratified(labels, limit)
        images = replace(
            images,
            **{part: getattr(images, part)[keep], f"{part}_labels": labels[keep]},
            notes=[*images.notes, f"{part}: {len(keep)} of {len(labels)} images, stratified"],
        )
    return images


def load(args: argparse.Namespace, limits: dict[str, int | None]) -> Images:
    """Return the images that the user asked for, of `options.add_images`."""
    size = args.image_size or IMAGE_SIZE.get(args.dataset, 32)
    if args.data is not None:
        images = from_folder(args.data, size, args.skip_corrupt)
    elif args.dataset == "digits":
        images = digits(size)
    else:
        images = from_torchvision(args.dataset, args.data_root, size)
    return limited(images, limits)
