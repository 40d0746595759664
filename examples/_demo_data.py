"""Images for the demo: read once, checked, made RGB, resized, and kept as uint8 tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from lightly.transforms.simclr_transform import SimCLRViewTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

TORCHVISION = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "stl10": datasets.STL10,
    "fashion-mnist": datasets.FashionMNIST,
}
IMAGE_SIZE = {"digits": 16, "stl10": 64}  # every other source: 32
TEST_SHARE = 0.2  # of a source that has no test images of its own


class DemoError(Exception):
    """Something that the user has to put right; its text is one line that says what."""


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
            reason = (
                str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            )
            raise DemoError(
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
            raise DemoError(f"{folder} does not exist")
        if not folder.is_dir():
            raise DemoError(f"{folder} is a file; --data takes a folder of class folders")
        scored = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        if (folder / "train").is_dir():
            parts = [folder / "train"] + ([scored] if scored else [])
        elif scored is not None:
            raise DemoError(f"{folder} has {scored.name}/ but no train/")
        else:
            parts = [folder]
        found = [_list(part) for part in parts]
    except PermissionError as error:
        raise DemoError(f"cannot read {error.filename}: permission denied") from error
    classes = sorted(found[0])
    if len(parts) == 2 and sorted(found[1]) != classes:
        odd = sorted(set(classes) ^ set(found[1]))
        raise DemoError(
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
                        raise DemoError(f"cannot read {path}: permission denied") from error
                    # Pillow's decoders raise nearly anything on broken bytes (OSError, SyntaxError,
                    # struct.error, …).
                    except Exception:
                        corrupt.append(str(path.relative_to(folder)))
            read.append((images, torch.tensor(labels)))
    if corrupt:
        text = f"{len(corrupt)} of {total} images in {folder} are unreadable: {listed(corrupt)}"
        if not skip_corrupt:
            raise DemoError(f"{text}. Mend or remove them, or leave them out with --skip-corrupt.")
        for part, (_, labels_read) in zip(parts, read, strict=True):
            counts = labels_read.bincount(minlength=len(classes)).tolist()
            for name, count in zip(classes, counts, strict=True):
                if count < 2:
                    raise DemoError(
                        f"{text}. Without them {part / name} has {count} images; a class needs 2."
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
        raise DemoError(f"{part} has no class folders: expected {part}/<class>/<image>")
    files = {f.name: _images_below(f) for f in folders}
    for name, paths in files.items():
        if len(paths) < 2:
            what = "no images" if not paths else f"a single image ({paths[0].name})"
            raise DemoError(f"class folder {part / name} has {what}; a class needs at least 2")
    if len(files) < 2:
        raise DemoError(
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
            raise DemoError(f"{limit} {part} images are fewer than {len(images.classes)} classes")
        keep = stratified(labels, limit)
        images = replace(
            images,
            **{part: getattr(images, part)[keep], f"{part}_labels": labels[keep]},
            notes=[*images.notes, f"{part}: {len(keep)} of {len(labels)} images, stratified"],
        )
    return images


def load(
    data: Path | None,
    dataset: str,
    data_root: Path,
    size: int | None,
    skip_corrupt: bool,
    limits: dict[str, int | None],
) -> Images:
    """Return the images the user asked for."""
    size = size or IMAGE_SIZE.get(dataset, 32)
    if data is not None:
        images = from_folder(data, size, skip_corrupt)
    elif dataset == "digits":
        images = digits(size)
    else:
        images = from_torchvision(dataset, data_root, size)
    return limited(images, limits)


def view_transform(images: Images, dataset: str) -> SimCLRViewTransform:
    """Return lightly's SimCLR view with what makes sense for these images; every method gets this
    one.

    Photographs: lightly's CIFAR-10 settings (colour jitter 0.5, no blur). Digits: no flips, which
        turn a digit into
    none, and nothing about colour; a milder crop and a turn of up to 15 degrees.
    """
    normalize = {"mean": [0.5] * 3, "std": [0.5] * 3}
    if dataset == "digits":
        return SimCLRViewTransform(
            input_size=images.size,
            cj_prob=0.0,
            random_gray_scale=0.0,
            gaussian_blur=0.0,
            hf_prob=0.0,
            min_scale=0.4,
            rr_prob=1.0,
            rr_degrees=15,
            normalize=normalize,
        )
    if dataset == "fashion-mnist":
        return SimCLRViewTransform(
            input_size=images.size,
            cj_prob=0.0,
            random_gray_scale=0.0,
            gaussian_blur=0.0,
            normalize=normalize,
        )
    return SimCLRViewTransform(
        input_size=images.size, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize
    )


def normalized(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [−1, 1], like the views."""
    return images.float().div(127.5).sub(1.0)


class Views(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Two views of each image; the key (epoch, index) fixes them, whatever process makes them."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: SimCLRViewTransform, seed: int
    ) -> None:
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], int]:
        epoch, index = key
        stream = ((self.seed * 100_003 + epoch) * 10_000_019 + index) % 2**32
        # lightly's transforms draw from both global generators. default_generator, because
        # torch.manual_seed visits every accelerator and would cost as much as a view.
        torch.default_generator.manual_seed(stream)
        np.random.seed(stream)
        image = Image.fromarray(self.images[index].permute(1, 2, 0).numpy())
        return (self.transform(image), self.transform(image)), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


class StoredViews(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Views of every epoch, made once and read by all methods of a seed; the same as `Views`."""

    def __init__(self, path: Path, views: Views, epochs: int, size: int) -> None:
        self.labels = views.labels
        if not path.exists():
            part = path.with_name(path.name + ".part")
            shape = (epochs, len(views), 2, 3, size, size)
            stored = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            with tqdm(total=epochs * len(views), desc="views", leave=False, disable=None) as bar:
                for epoch in range(epochs):
                    for index in range(len(views)):
                        pair = torch.stack(views[epoch, index][0])
                        stored[epoch, index] = pair.add(1).mul(127.5).round().byte().numpy()
                        bar.update()
            stored.flush()
            part.replace(path)
        self.stored = np.load(path, mmap_mode="r")

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], int]:
        pair = normalized(torch.from_numpy(self.stored[key].copy()))
        return (pair[0], pair[1]), int(self.labels[key[1]])

    def __len__(self) -> int:
        return len(self.labels)


class EpochSampler(Sampler[tuple[int, int]]):
    """This rank's share of every global batch, in an order that only seed and epoch decide.

    A global batch is the same images for any number of ranks, and a resumed run goes on with the
    order it would have had. Lightning calls `set_epoch` before each epoch; but it makes the first
    iterator before it restores a checkpoint, and keeps it, so `start` says which epoch that is for.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = start

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = max(epoch, self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(
            self.n, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        )
        batches = order[: self.n // self.batch_size * self.batch_size].view(
            -1, self.world_size, self.batch_size // self.world_size
        )
        return iter([(self.epoch, index) for index in batches[:, self.rank].flatten().tolist()])

    def __len__(self) -> int:
        return self.n // self.batch_size * (self.batch_size // self.world_size)
