"""Tables 1, 4 and 9, Figure 4 and the trial of section 3: how good the frozen features are."""

from __future__ import annotations

import statistics
from dataclasses import replace

from experiments.methods import KINDS
from experiments.paper import pictures
from experiments.paper.published import NOTHING, ORACLE_GAIN, TABLE1, TABLE4, TABLE9, Accuracy
from experiments.paper.report import Report, accuracy_table, means, paper_column, percents, ranking
from experiments.paper.runs import Lab, Spec
from experiments.report import markdown, mean_and_spread

PROTOCOL = (
    "LP: linear evaluation of Table 6, the best of five learning rates ON THE TEST IMAGES, as the "
    "paper reports it. kNN: lightly's, cosine, temperature 0.1, k cut to the training images. All "
    "in %, of test images. Mean over seeds ± standard deviation, and the best seed."
)


def table1(lab: Lab) -> Report:
    """Compare SimCLR, MoCo, MoCo v2, BYOL and C2BIN."""
    methods = "untrained", "simclr", "moco", "mocov2", "byol", "c2bin"
    results = lab.results([lab.spec(method) for method in methods])
    rows = {KINDS[spec.method].label: runs for spec, runs in results.items()}
    column = paper_column(lab)
    papers = {label: scores[column] for label, scores in TABLE1.items() if column in scores}
    # Our means stand beside the paper's mean; its best seed has a line of its own.
    papers["C2BIN"] = papers.pop("C2BIN [mean]")
    table = accuracy_table(rows, papers, column)
    return Report("Table 1: features of five methods", [table, ranking(rows), PROTOCOL], rows)


def table4(lab: Lab) -> Report:
    """Take away heads, or make them equal; several also with the mean of their terms."""
    results = lab.results(
        [
            Spec("c2bin" if k else "byol", k, averaged=averaged)
            for k in lab.budget.heads
            for averaged in (False, True)[: 1 + (len(k) > 1)]
        ]
    )
    rows, papers = {}, {}
    for spec, runs in results.items():
        label = spec.heads or "no heads"
        rows[label] = runs
        lone = Accuracy(TABLE9.get(spec.clusters), None, None)
        papers[label] = NOTHING if spec.averaged else TABLE4.get(spec.clusters, lone)
    mean = means(rows, "LP")
    changes = [f"{k} {mean[k] - mean['no heads']:+.1f}" for k in mean if k != "no heads"]
    words = f"Highest mean LP: {max(mean, key=mean.__getitem__)}. LP against no heads, in points: "
    parts = [accuracy_table(rows, papers, "stl10", "heads"), words + ", ".join(changes) + "."]
    how = (
        "The paper sums the cluster terms of all heads, so that three weigh three times as much "
        "beside the alignment as one; averaged: the sum is divided by the number of heads."
    )
    title = "Tables 4 and 9: which heads"
    return Report(title, [*parts, how, PROTOCOL], rows, unsure=("table4", "table9"))


def oracle(lab: Lab) -> Report:
    """Drop the negatives of SimCLR that share the class."""
    results = lab.results([lab.spec("simclr"), lab.spec("oracle")])
    rows = {KINDS[spec.method].label: runs for spec, runs in results.items()}
    before, after = (percents(runs, "LP") for runs in rows.values())
    gains = [b - a for a, b in zip(before, after, strict=True)]
    gain = mean_and_spread(gains, "+.1f").replace("± +", "± ")
    words = (
        f"Gain in LP: {gain} points; the paper reports more than "
        f"{ORACLE_GAIN:g} on STL-10, and no other numbers. This method reads the labels: it is a "
        "bound for the idea, no method."
    )
    table = accuracy_table(rows, {}, "stl10")
    title = "Section 3: SimCLR without negatives of the same class"
    return Report(title, [table, words, PROTOCOL], rows)


def figure4(lab: Lab) -> Report:
    """Train on ever more unbalanced classes."""
    methods = [lab.spec(method) for method in ("simclr", "byol", "pica", "c2bin")]
    rates = lab.budget.rates
    results = lab.results([replace(spec, rate=r) for spec in methods for r in rates])
    drops: dict[str, dict[float, list[float]]] = {}
    body = []
    for spec in methods:
        name = KINDS[spec.method].label
        lps = {r: percents(results[replace(spec, rate=r)], "LP") for r in rates}
        drops[name] = {
            r: [a - b for a, b in zip(lps[rates[0]], lps[r], strict=True)] for r in rates
        }
        losses = [mean_and_spread(drops[name][r], ".1f") for r in rates[1:]]
        ends = [mean_and_spread(lps[r], ".1f") for r in (rates[0], rates[-1])]
        body.append([name, ends[0], *losses, ends[1]])
    head = ["method", "LP at rate 1", *(f"loss at rate {rate:g}" for rate in rates[1:])]
    head += [f"LP at rate {rates[-1]:g}"]
    sizes = ", ".join(f"{len(lab.images(rate=rate).train)} at {rate:g}" for rate in rates)
    least = min(drops, key=lambda name: statistics.fmean(drops[name][rates[-1]]))
    words = (
        f"Smallest loss at rate {rates[-1]:g}: {least}. Training images: {sizes}. The epochs are "
        "the same for every rate, so a larger rate also means fewer steps: the loss is that of "
        "imbalance, of fewer images and of shorter training together, and a method that starts "
        "low has less to lose."
    )
    pictures.degradation(lab.out / "figure4.png", drops)
    return Report(
        "Figure 4: loss of accuracy on long-tailed classes",
        [markdown(head, body), words, PROTOCOL],
        {f"{KINDS[s.method].label}, rate {s.rate:g}": runs for s, runs in results.items()},
        ["figure4.png"],
        ["figure4"],
    )
