"""Images with other labels or other class sizes: CIFAR-100's superclasses, long-tailed subsets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from experiments.data import Images
from experiments.store import ExperimentError

# Krizhevsky (2009): superclasses and their classes, names as in torchvision.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def superclasses(classes: list[str]) -> Tensor:
    """Return the superclass (100,) of each class of CIFAR-100, in the order of `SUPERCLASSES`.

    Raises:
        ExperimentError: If the classes are not those of CIFAR-100.
    """
    found = {name: i for i, names in enumerate(SUPERCLASSES.values()) for name in names.split()}
    if sorted(classes) != sorted(found):
        raise ExperimentError(
            f"superclasses are known of CIFAR-100's 100 classes, got {len(classes)}"
        )
    return torch.tensor([found[name] for name in classes])


def with_superclasses(images: Images) -> Images:
    """Return CIFAR-100 with its 20 superclasses for labels."""
    of = superclasses(images.classes)
    return replace(
        images,
        train_labels=of[images.train_labels],
        test_labels=of[images.test_labels],
        classes=list(SUPERCLASSES),
        notes=[*images.notes, "labels: the 20 superclasses"],
    )


def long_tailed(labels: Tensor, rate: float, seed: int) -> Tensor:
    """Return the indices of a long-tailed subset (Cui et al., 2019).

    Class c of C keeps `n rate^(−c / (C − 1))` of its images, rounded down but at least one, where n
    is the size of the smallest class before: so the first class has `rate` times the last one's.

    Args:
        labels: Classes, int (n,).
        rate: Largest class to smallest; 1 keeps a balanced set.
        seed: Of the choice within a class; a larger rate keeps a part of what a smaller one does.

    Returns:
        Indices int64, ascending.

    Raises:
        ExperimentError: If the rate is below 1.
    """
    if not rate >= 1:
        raise ExperimentError(f"the balance rate must be at least 1, got {rate}")
    counts = labels.bincount()
    largest, last = int(counts.min()), len(counts) - 1
    draw = torch.Generator().manual_seed(seed)
    kept = []
    for c in range(len(counts)):
        members = (labels == c).nonzero().flatten()
        # Cui et al. truncate; the tiny term undoes a power that ends just below a whole number.
        take = max(1, int(largest * rate ** (-c / max(1, last)) + 1e-9))
        kept.append(members[torch.randperm(len(members), generator=draw)[:take]])
    return torch.cat(kept).sort().values


def thinned(images: Images, rate: float, seed: int) -> Images:
    """Return a long-tailed subset of the training images; the test images stay as they are."""
    if rate == 1:
        return images
    keep = long_tailed(images.train_labels, rate, seed)
    sizes = images.train_labels[keep].bincount().tolist()
    return replace(
        images,
        train=images.train[keep],
        train_labels=images.train_labels[keep],
        notes=[*images.notes, f"balance rate {rate:g}: {', '.join(map(str, sizes))} images"],
    )
