"""Table 3 and Figures 5 to 11: clusters, retrieval and maps under the recipe of Table 10."""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from experiments.evaluation import Features, cluster_scores, kmeans
from experiments.methods import KINDS
from experiments.paper import pictures
from experiments.paper.published import CC, DATASETS, FIGURE5, TABLE11, UNKNOWN
from experiments.paper.report import Report, number, paper_column
from experiments.paper.runs import PRECISION_AT, Lab, Spec
from experiments.pictures import clusters as draw_clusters
from experiments.report import markdown, mean_and_spread
from experiments.store import Result

SCORES = {"NMI": "nmi", "ACC": "acc", "purity": "purity", "ARI": "ari"}
# Whose published numbers stand beside which of our rows.
PUBLISHED = {f"{name} on pixels": TABLE11[name] for name in ("K-means", "SC", "AC")}
PUBLISHED |= {"IIC": TABLE11["IIC"], "PICA": TABLE11["PICA [mean]"], "CC": CC}
PUBLISHED |= {"C2BIN": TABLE11["C2BIN [mean]"]}
PIXEL_IMAGES = 10_000  # spectral and agglomerative clustering hold a matrix of all pairs
QUERIES = 8
RANKS = (1, 2, 10, 50, 100)


def specs(lab: Lab, *methods: str) -> dict[str, Spec]:
    """Return the specs of Table 10's recipe by method."""
    return {name: lab.spec(name, clustering=True) for name in methods}


def pixel_clusters(images: Tensor, k: int, seed: int) -> dict[str, Tensor]:
    """Return the clusters (n,) of images uint8 (n, 3, S, S) that their pixels alone give."""
    from sklearn.cluster import AgglomerativeClustering, KMeans, SpectralClustering

    pixels = images.flatten(1).double().div(255).numpy()
    near = {"affinity": "nearest_neighbors", "n_neighbors": min(10, len(pixels) - 1)}
    models = {
        "K-means": KMeans(k, n_init=5, random_state=seed),
        "SC": SpectralClustering(k, random_state=seed, **near),
        "AC": AgglomerativeClustering(k),
    }
    with warnings.catch_warnings():
        # The neighbours of some images form islands; scikit-learn says so and goes on.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return {n: torch.from_numpy(m.fit_predict(pixels)).long() for n, m in models.items()}


def table3(lab: Lab) -> Report:
    """Compare C2BIN's own clusters with those of pixels, of other features and of other heads."""
    wanted = specs(lab, "simclr", "byol", "iic", "pica", "cc", "c2bin")
    results = lab.results(list(wanted.values()))
    images = lab.images(clustering=True)
    k, few = len(images.classes), slice(PIXEL_IMAGES)
    rows: dict[str, list[Result]] = {}
    for seed in lab.seeds:
        for name, found in pixel_clusters(images.test[few], k, seed).items():
            scores = cluster_scores(images.test_labels[few], found)
            rows.setdefault(f"{name} on pixels", []).append(scores)
    for method, spec in wanted.items():
        label = f"k-means on {KINDS[method].label}'s features"
        rows[label] = [run["clustering"][0] for run in results[spec]]
    for method, spec in wanted.items():
        if spec.clusters:
            rows[KINDS[method].label] = [run["clustering"][1] for run in results[spec]]

    column, head, body = paper_column(lab), ["method"], []
    for title in SCORES:
        head += [f"{title} mean", "best", f"paper, {DATASETS[column]}"][
            : 2 if title == "purity" else 3
        ]
    for label, runs in rows.items():
        cells = [label]
        published = PUBLISHED[label][column] if label in PUBLISHED else UNKNOWN
        for score in SCORES.values():
            values = [run[score] for run in runs]
            cells += [mean_and_spread(values, ".3f"), f"{max(values):.3f}"]
            if score != "purity":
                cells.append(number(getattr(published, score), ".2f"))
        body.append(cells)
    all_rows = [
        [label, *(" / ".join(number(v, ".2f") for v in scores[name]) for name in DATASETS)]
        for label, scores in TABLE11.items()
    ]
    nmi = {label: statistics.fmean(run["nmi"] for run in runs) for label, runs in rows.items()}
    order = sorted(nmi, key=lambda label: -nmi[label])
    words = (
        f"By NMI, C2BIN's own head of {k} clusters is {order.index('C2BIN') + 1} of {len(order)}; "
        f"first is {order[0]} ({nmi[order[0]]:.3f} against {nmi['C2BIN']:.3f})."
    )
    how = (
        "ACC matches clusters one to one with classes; purity lets each stand for its commonest "
        "class, which is how the paper words its ACC. Pixels are clustered on the test images "
        "themselves; k-means of features and the methods' own heads are fitted on training images "
        "only. The published results of this literature often train on the test images too. Of "
        "several heads, the one with as many clusters as classes is scored. All methods have the "
        "same backbone, views and optimisation. CC is younger than the paper: its published "
        "numbers are from its own."
    )
    whole = markdown(["method", *DATASETS.values()], all_rows)
    above = "All of Table 11, as published (NMI / ACC / ARI):"
    parts = [markdown(head, body), words, how, above, whole]
    return Report("Tables 3 and 11: clusters", parts, rows, unsure=["table10"])


def figure5(lab: Lab) -> Report:
    """Draw the test features as training proceeds."""
    wanted = specs(lab, "c2bin", "simclr")
    lab.results(list(wanted.values()))
    images = lab.images(clustering=True)
    k, epochs, seed = len(images.classes), lab.budget.snapshots, lab.seeds[0]
    features: dict[str, list[Any]] = {}
    scores: dict[str, list[dict[str, float]]] = {}
    for method, spec in wanted.items():
        label = KINDS[method].label
        features[label], scores[label] = [], []
        for epoch in epochs:
            arrays = lab.arrays(spec, f"epoch{epoch}")
            test = Features(torch.from_numpy(arrays["test"]), images.test_labels)
            found = {"k-means ARI": kmeans(test, test, k=k, seed=seed)}
            if "head0" in arrays:
                found["head ARI"] = torch.from_numpy(arrays["head0"]).argmax(dim=1)
            features[label].append(arrays["test"])
            scores[label].append(
                {n: cluster_scores(test.labels, c)["ari"] for n, c in found.items()}
            )
    path, labels = lab.out / "figure5.png", images.test_labels.numpy()
    pictures.evolution(path, features, scores, epochs, labels, images.classes, seed)
    body = [
        [label, name.removesuffix(" ARI"), *(f"{row[name]:.3f}" for row in each)]
        for label, each in scores.items()
        for name in each[0]
    ]
    body += [
        [f"{label}, paper, STL-10, epochs 5, 30, 100", "?", *(f"{value:.2f}" for value in values)]
        for label, values in FIGURE5.items()
    ]
    how = (
        f"Seed {seed}. k-means with {k} clusters on the test features; head is C2BIN's own of {k} "
        "clusters. The paper does not say which of them it means."
    )
    head = ["method", "ARI of", *(f"epoch {epoch}" for epoch in epochs)]
    title, parts = (
        "Figure 5: test features as training proceeds",
        [markdown(head, body, (0, 1)), how],
    )
    return Report(title, parts, scores, ["figure5.png"], ["figure5", "table10"])


def figure6(lab: Lab) -> Report:
    """Retrieve the nearest test images of a query."""
    wanted = specs(lab, "c2bin", "simclr", "pica", "byol")
    results = lab.results(list(wanted.values()))
    images = lab.images(clustering=True)
    labels = images.test_labels
    ranks = [rank for rank in RANKS if rank < len(labels)]
    # One image a class, the same whatever the methods make of it.
    draw = torch.Generator().manual_seed(0)
    queries = []
    for label in labels.unique().tolist()[:QUERIES]:
        members = (labels == label).nonzero().flatten()
        queries.append(int(members[torch.randint(len(members), (1,), generator=draw)]))
    found, curves = {}, {}
    ks = [k for k in PRECISION_AT if k < len(labels)]
    for method, spec in wanted.items():
        unit = normalize(torch.from_numpy(lab.arrays(spec)["test"]), dim=1)
        cosine = unit[queries] @ unit.T
        cosine[torch.arange(len(queries)), queries] = -torch.inf
        order = cosine.argsort(dim=1, descending=True)
        name = KINDS[method].label
        found[name] = order[:, [rank - 1 for rank in ranks]].numpy()
        curves[name] = {
            float(k): [100 * run["precision_at"][str(k)] for run in results[spec]] for k in ks
        }
    pictures.retrieved(lab.out / "figure6.png", images, queries, found, ranks)
    pictures.precision(lab.out / "figure8.png", curves)
    body = [
        [label, *(mean_and_spread(values, ".1f") for values in curve.values())]
        for label, curve in curves.items()
    ]
    mean = {k: {n: statistics.fmean(c[k]) for n, c in curves.items()} for k in ks}
    best = ", ".join(f"{max(each, key=each.__getitem__)} at {k}" for k, each in mean.items())
    how = (
        "Share of the k nearest other test images, by cosine, that are of the query's class, in %, "
        "averaged over all test images as queries; mean over seeds ± standard deviation. BYOL is "
        "not in the paper's figures."
    )
    parts = [markdown(["method", *(f"k = {k}" for k in ks)], body)]
    parts += [f"Highest precision: {best}.", how]
    files = ["figure6.png", "figure8.png"]
    return Report("Figures 6 to 8: retrieval", parts, curves, files, ["figure8"])


def figure9(lab: Lab) -> Report:
    """Draw images of the clusters of each head."""
    spec = specs(lab, "c2bin")["c2bin"]
    results = lab.results([spec])[spec]
    images, arrays, seed = lab.images(clustering=True), lab.arrays(spec), lab.seeds[0]
    labels, files, body = images.test_labels.numpy(), [], []
    for i, k in enumerate(spec.clusters):
        files.append(f"figure{9 + i}.png")
        path, head = lab.out / files[-1], arrays[f"head{i}"]
        draw_clusters(path, images.test, labels, images.classes, head, rows=10, sample=seed)
        rows = [run["clustering"][1 + i] for run in results]
        cells = [mean_and_spread([row[name] for row in rows], ".3f") for name in SCORES.values()]
        counts = [
            mean_and_spread([row[name] for row in rows], ".1f")
            for name in ("clusters_in_use", "effective_clusters")
        ]
        body.append([str(k), *cells, *counts])
    how = (
        "Each sheet has the ten largest clusters of one head on the test images, twelve images "
        f"drawn at random from each (seed {seed}), framed by their class. Purity grows with K "
        "whatever the clusters; in use: clusters with a test image; effective: exp of the entropy "
        "of the mean assignment."
    )
    table = markdown(["K", *SCORES, "in use", "effective"], body, left=())
    return Report("Figures 9 to 11: images by cluster", [table, how], results, files)
