"""The paper's numbers, as printed, each with the table it came from.

The text of the PDF is damaged in places. `UNSURE` says where, and what was read instead.
"""

from __future__ import annotations

from typing import NamedTuple


class Accuracy(NamedTuple):
    """Test accuracy in %: linear evaluation, kNN with k = 5 and with k = 200."""

    linear: float | None
    knn5: float | None
    knn200: float | None


class Clustering(NamedTuple):
    """Scores of a clustering in [0, 1]."""

    nmi: float | None
    acc: float | None
    ari: float | None


DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}
NOTHING = Accuracy(None, None, None)
UNKNOWN = Clustering(None, None, None)

# Table 1: ResNet-18, by method and data set.
TABLE1: dict[str, dict[str, Accuracy]] = {
    "DC": {"cifar10": Accuracy(None, None, 67.6)},
    "NPID": {"cifar10": Accuracy(None, None, 80.8), "cifar100": Accuracy(None, None, 51.6)},
    "SimCLR": {
        "cifar10": Accuracy(81.3, 82.4, 81.7),
        "cifar100": Accuracy(59.8, 63.9, 66.8),
        "stl10": Accuracy(83.1, 78.3, 78.8),
    },
    "MoCo": {
        "cifar10": Accuracy(78.1, 79.7, 77.7),
        "cifar100": Accuracy(50.2, 56.7, 58.2),
        "stl10": Accuracy(79.4, 74.3, 74.2),
    },
    "MoCo v2": {
        "cifar10": Accuracy(81.6, 81.4, 83.9),
        "cifar100": Accuracy(61.1, 62.8, 63.8),
        "stl10": Accuracy(83.5, 78.2, 78.1),
    },
    "BYOL": {
        "cifar10": Accuracy(80.8, 81.4, 79.7),
        "cifar100": Accuracy(57.0, 63.3, 61.4),
        "stl10": Accuracy(80.4, 76.5, 77.5),
    },
    "C2BIN [mean]": {
        "cifar10": Accuracy(81.5, 84.8, 84.9),
        "cifar100": Accuracy(61.5, 72.2, 72.6),
        "stl10": Accuracy(83.6, 79.1, 80.1),
    },
    "C2BIN [best]": {
        "cifar10": Accuracy(82.3, 85.9, 85.3),
        "cifar100": Accuracy(62.1, 73.9, 73.8),
        "stl10": Accuracy(84.0, 79.9, 80.8),
    },
}

# Table 2: method, epochs, batch size, top-1 accuracy in % of a linear classifier on ImageNet.
TABLE2 = [
    ("NPID", 200, 256, 56.5),
    ("MoCo", 200, 256, 60.6),
    ("SimCLR", 200, 256, 61.9),
    ("MoCo v2", 200, 256, 67.5),
    ("BYOL", 200, 256, 64.3),
    ("C2BIN", 200, 256, 64.4),
    ("SimCLR", 400, 4096, 68.2),
    ("SwAV", 400, 4096, 70.1),
    ("MoCo v2", 800, 256, 71.1),
]

# Table 4, STL-10: the sets of clusters of the heads, and the scores.
TABLE4: dict[tuple[int, ...], Accuracy] = {
    (): Accuracy(80.4, 76.5, 77.5),
    (32,): Accuracy(78.4, 73.5, 73.9),
    (128,): Accuracy(81.3, 76.3, 77.0),
    (32, 32, 32): Accuracy(79.3, 74.4, 75.5),
    (128, 128, 128): Accuracy(82.2, 76.3, 76.4),
    (32, 64, 128): Accuracy(84.0, 79.9, 80.8),
}

# Table 9, STL-10: the same for further sets, linear evaluation alone.
TABLE9: dict[tuple[int, ...], float] = {
    (8,): 75.28,
    (16,): 79.06,
    (512,): 80.01,
    (8, 8, 8): 76.08,
    (16, 16, 16): 80.08,
    (512, 512, 512): 80.50,
    (8, 16, 32): 83.50,
    (16, 32, 64): 83.91,
}


def _row(*numbers: float | None) -> dict[str, Clustering]:
    parts = (Clustering(*numbers[i : i + 3]) for i in range(0, 9, 3))
    return dict(zip(DATASETS, parts, strict=True))


# Table 11 (of which Table 3 is an excerpt): NMI, ACC, ARI on CIFAR-10, CIFAR-100 (20 superclasses),
# STL-10.
TABLE11: dict[str, dict[str, Clustering]] = {
    "K-means": _row(0.09, 0.23, 0.05, 0.08, 0.13, 0.03, 0.13, 0.19, 0.06),
    "SC": _row(0.10, 0.25, 0.09, 0.09, 0.14, 0.02, 0.10, 0.16, 0.05),
    "AC": _row(0.11, 0.23, 0.07, 0.10, 0.14, 0.03, 0.24, 0.33, 0.14),
    "NMF": _row(0.08, 0.19, 0.03, 0.08, 0.12, 0.03, 0.10, 0.18, 0.05),
    "AE": _row(0.24, 0.31, 0.17, 0.10, 0.17, 0.05, 0.25, 0.30, 0.16),
    "DAE": _row(0.25, 0.30, 0.16, 0.11, 0.15, 0.05, 0.22, 0.30, 0.15),
    "DCGAN": _row(0.27, 0.32, 0.18, 0.12, 0.15, 0.05, 0.21, 0.30, 0.14),
    "DeCNN": _row(0.24, 0.28, 0.17, 0.09, 0.13, 0.04, 0.23, 0.30, 0.16),
    "VAE": _row(0.25, 0.29, 0.17, 0.11, 0.15, 0.04, 0.20, 0.28, 0.15),
    "JULE": _row(0.19, 0.27, 0.14, 0.10, 0.14, 0.03, 0.18, 0.28, 0.16),
    "DEC": _row(0.26, 0.30, 0.16, 0.14, 0.19, 0.05, 0.28, 0.36, 0.19),
    "DAC": _row(0.40, 0.52, 0.30, 0.19, 0.24, 0.09, 0.37, 0.47, 0.26),
    "ADC": _row(None, 0.33, None, None, 0.16, None, None, 0.53, None),
    "DDC": _row(0.42, 0.52, 0.33, None, None, None, 0.37, 0.49, 0.27),
    "DCCM": _row(0.50, 0.62, 0.41, 0.29, 0.33, 0.17, 0.38, 0.48, 0.26),
    "IIC": _row(None, 0.62, None, None, 0.26, None, None, 0.61, None),
    "PICA [mean]": _row(0.56, 0.65, 0.47, 0.30, 0.32, 0.16, 0.59, 0.69, 0.50),
    "PICA [best]": _row(0.59, 0.70, 0.51, 0.31, 0.34, 0.17, 0.61, 0.71, 0.53),
    "C2BIN [mean]": _row(0.62, 0.72, 0.53, 0.36, 0.35, 0.20, 0.62, 0.73, 0.55),
    "C2BIN [best]": _row(0.63, 0.73, 0.55, 0.38, 0.38, 0.22, 0.64, 0.75, 0.57),
    "SCAN (two-step)": _row(0.80, 0.88, 0.77, 0.49, 0.51, 0.33, 0.70, 0.81, 0.65),
}

# Not in the paper: Li et al., "Contrastive Clustering", AAAI 2021.
CC = _row(0.705, 0.790, 0.637, 0.431, 0.429, 0.266, 0.764, 0.850, 0.726)

# Section 3: the classification accuracy on STL-10 rises by more than this, in points, when the
# negatives of SimCLR that share the class are dropped.
ORACLE_GAIN = 5.0

# Figure 5, STL-10: ARI of C2BIN and SimCLR at three epochs.
FIGURE5_EPOCHS = (5, 30, 100)
FIGURE5 = {"C2BIN": (0.15, 0.46, 0.55), "SimCLR": (0.16, 0.39, 0.49)}

UNSURE = {
    "table2": "NPID's epochs are illegible; 200, as in the rows below it.",
    "table4": "Rows {32} and {32, 32, 32}: the printed differences to the first row (-1.6, -0.9) "
    "do not fit the printed LP (78.4, 79.3), which would be -2.0 and -1.1.",
    "table5": 'The epochs read "-300"; 300.',
    "table7": 'The epochs read "^2G0"; 200, as Table 2 has it.',
    "table9": "The row {512}: 80.01 is -3.99 from the first row, printed as -3.9.",
    "table10": 'The epochs read "Igg"; 100, the last epoch that Figure 5 shows.',
    "figure4": "The figure's values are not in the text.",
    "figure5": "Which of the six printed ARIs belongs to which panel is unsure: in each row they "
    "were put in rising order, which gives C2BIN its mean of Table 3 at the last epoch.",
    "figure8": "The figure's values are not in the text.",
}
