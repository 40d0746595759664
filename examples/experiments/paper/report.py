"""What an experiment leaves behind: NAME.json, NAME.md and pictures; nothing is overwritten."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.hardware import hardware, versions
from experiments.paper.published import DATASETS, NOTHING, UNSURE, Accuracy
from experiments.paper.runs import Lab
from experiments.report import markdown, mean_and_spread
from experiments.store import Result

ACCURACIES = {"LP": "linear_best", "kNN 5": "knn5", "kNN 200": "knn200"}


@dataclass
class Report:
    """One experiment's outcome.

    Attributes:
        title: Of the page.
        parts: Its Markdown paragraphs and tables.
        results: All numbers, for the JSON file.
        pictures: Names of the files drawn.
        unsure: Keys of `UNSURE` that concern it.
    """

    title: str
    parts: list[str]
    results: Any
    pictures: Sequence[str] = ()
    unsure: Sequence[str] = field(default=())


def publish(lab: Lab, name: str, settings: dict[str, Any], report: Report, seconds: float) -> None:
    """Write NAME.json and NAME.md, and print the latter."""
    images = lab.images()
    notes = [
        f"Budget {lab.budget.name}: {images.source}, {len(images.train)} training and "
        f"{len(images.test)} test images of {images.size} × {images.size} pixels, "
        f"{len(images.classes)} classes; seeds {', '.join(map(str, lab.seeds))}; formulas "
        f"{lab.args.formulas}; {lab.args.precision}.",
        *(f"In the paper's text: {UNSURE[key]}" for key in report.unsure),
    ]
    text = "\n\n".join([*report.parts, *notes])
    everything: dict[str, Any] = {"experiment": name, "settings": settings, "versions": versions()}
    everything |= {"hardware": hardware(), "seconds_of_this_call": seconds}
    everything |= {"runs": lab.used, "results": report.results}
    shown = "".join(f"\n![{picture}]({picture})\n" for picture in report.pictures)
    lab.store.publish(name, everything, f"# {report.title}\n\n{text}\n{shown}")
    written = ", ".join([f"{name}.md", f"{name}.json", *report.pictures])
    print(f"\n{report.title}\n\n{text}\n\n{name}: {seconds:.0f} s; in {lab.out}: {written}\n")


def paper_column(lab: Lab) -> str:
    """Return the data set of the paper to compare with: the same one, if the paper has it."""
    name: str = lab.args.dataset if lab.args.dataset in DATASETS else lab.args.against
    return name


def number(value: float | None, form: str = ".1f") -> str:
    """Return a number of the paper, or a dash where it has none."""
    return "-" if value is None else format(value, form)


def percents(runs: list[Result], title: str) -> list[float]:
    """Return one of `ACCURACIES` in %, one value per seed."""
    return [100 * run[ACCURACIES[title]] for run in runs]


def means(rows: dict[str, list[Result]], title: str) -> dict[str, float]:
    """Return the mean over seeds of one of `ACCURACIES` in %, by row."""
    return {label: statistics.fmean(percents(runs, title)) for label, runs in rows.items()}


def accuracy_table(
    rows: dict[str, list[Result]], papers: dict[str, Accuracy], column: str, first: str = "method"
) -> str:
    """Return the Markdown table of rows of runs beside the paper's accuracies on a data set."""
    head, body = [first], []
    for title in ACCURACIES:
        head += [f"{title} mean", "best", *([f"paper, {DATASETS[column]}"] if papers else [])]
    for label in dict.fromkeys([*rows, *papers]):
        cells = [label]
        for title, theirs in zip(ACCURACIES, papers.get(label, NOTHING), strict=True):
            values = percents(rows.get(label, []), title)
            ours = [mean_and_spread(values, ".1f"), f"{max(values):.1f}"] if values else ["", ""]
            cells += [*ours, *([number(theirs)] if papers else [])]
        body.append(cells)
    return markdown(head, body)


def ranking(rows: dict[str, list[Result]]) -> str:
    """Return where C2BIN stands among the rows, in words that hide nothing."""
    sentences = []
    for title in ACCURACIES:
        mean = means(rows, title)
        order = sorted(mean, key=lambda label: -mean[label])
        other = next(label for label in order if label != "C2BIN")
        gap = mean["C2BIN"] - mean[other]
        verb = "ahead of" if gap > 0 else "behind" if gap < 0 else "level with"
        place = f"{order.index('C2BIN') + 1} of {len(order)}"
        sentences.append(f"{title}: C2BIN is {place}, {abs(gap):.1f} points {verb} {other}")
    return "; ".join(sentences) + "."
