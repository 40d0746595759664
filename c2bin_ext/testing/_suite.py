"""All invariants of a kind at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from c2bin_ext.testing import _invariants
from c2bin_ext.testing._invariants import ALL_KINDS, ON_ASSIGNMENTS, ON_PAIRS, Device, Kind, Shapes
from c2bin_ext.testing._search import InvariantError, Loss, LossRaisedError, name_of

# Every check of a loss, in the order of a report: the kinds it serves.
_KINDS: dict[str, tuple[str, ...]] = {
    "instance_permutation": ALL_KINDS,
    "cluster_relabelling": ON_ASSIGNMENTS,
    "view_swap": ON_PAIRS,
    "positive_scaling": ("embedding_pair",),
    "column_scale": ("assignment_pair",),
    "bounds": ALL_KINDS,
    "value_at_agreement": ON_PAIRS,
    "value_at_balance": ("assignment",),
    "value_at_collapse": ON_ASSIGNMENTS,
    "value_at_uniform": ON_ASSIGNMENTS,
    "monotone_entropy": ("assignment",),
    "finite": ALL_KINDS,
    "gradient": ALL_KINDS,
    "no_gradient_to_target": ("embedding_pair",),
    "dtype": ALL_KINDS,
    "lower_precision": ALL_KINDS,
}


@dataclass(frozen=True)
class Report:
    """Which invariants a loss keeps; prints as a table with every smallest example.

    Args:
        loss: name of the loss.
        passed: names of the invariants that hold on all examples tried.
        failed: the error of each that does not, by name.
        skipped: names of those that were not tried.
    """

    loss: str
    passed: tuple[str, ...]
    failed: Mapping[str, InvariantError | LossRaisedError]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.loss}: {len(self.passed)} of {len(self.passed) + len(self.failed)} hold"]
        lines += [f"  holds    {name}" for name in self.passed]
        lines += [f"  skipped  {name}" for name in self.skipped]
        for name, error in self.failed.items():
            what = "raised" if isinstance(error, LossRaisedError) else "FAILS"
            details = str(error).split("\n")[1:]
            lines += [f"  {what:<8} {name}", *(f"         {line}" for line in details)]
        return "\n".join(lines)


class InvariantsError(AssertionError):
    """Some invariants of a loss do not hold.

    Args:
        report: what was found, also for those that do.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(str(report))


def invariants(kind: Kind) -> tuple[str, ...]:
    """Name the invariants of one kind of loss, for `pytest.mark.parametrize` and `skip`.

    Args:
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.

    Returns:
        The names; `check_` and a name is the function.

    Raises:
        ValueError: an unknown kind.

    Examples:
        >>> from c2bin_ext.testing import invariants
        >>> invariants("assignment")[:3]
        ('instance_permutation', 'cluster_relabelling', 'bounds')

    Source: the table of the page on the testing kit.
    """
    if kind not in ALL_KINDS:
        raise ValueError(f"kind: expected one of {ALL_KINDS}, got {kind!r}")
    return tuple(name for name, kinds in _KINDS.items() if kind in kinds)


def check_invariants(
    loss: Loss,
    kind: Kind = "assignment_pair",
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    raises: bool = True,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> Report:
    """Check every invariant of a kind of loss, and report all that do not hold.

    Formula: the conjunction of `invariants(kind)`, less `skip`. Additivity over shards is about a
    statistic rather than a loss: see `check_additive_over_shards`.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        only: names of the invariants to check; all of the kind by default.
        skip: names of the invariants that the loss is not meant to keep.
        options: by name of the invariant, arguments of its check, such as
            `{"bounds": {"upper": 2}}`. Bounds and values are C2BIN's defaults unless given.
        raises: raise where an invariant does not hold; False leaves that to the caller.
        max_examples: how many examples each check tries.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) or (n, d) to draw from, such as one alone for a compiled loss.
        device: where the inputs lie.

    Returns:
        The report.

    Raises:
        InvariantsError: an invariant does not hold, or the loss raised; has the `report`.
        ValueError: a name or kind that does not exist.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import check_invariants
        >>> check_invariants(ClusterEntropyRegularizer(), "assignment", max_examples=20).passed[:2]
        ('instance_permutation', 'cluster_relabelling')

    Source: the table of the page on the testing kit.
    """
    names = invariants(kind)
    options = options or {}
    for argument, given in (("only", only or ()), ("skip", skip), ("options", options)):
        if isinstance(given, str) or (unknown := sorted(set(given) - set(names))):
            wrong = given if isinstance(given, str) else unknown
            raise ValueError(f"{argument}: expected names out of {names}, got {wrong!r}")
    passed: list[str] = []
    skipped: list[str] = []
    failed: dict[str, InvariantError | LossRaisedError] = {}
    for name in names:
        if name in skip or (only is not None and name not in only):
            skipped.append(name)
            continue
        check: Callable[..., None] = getattr(_invariants, f"check_{name}")
        arguments: dict[str, Any] = {
            "max_examples": max_examples,
            "derandomize": derandomize,
            "shapes": shapes,
            "device": device,
        }
        if len(_KINDS[name]) > 1:
            arguments["kind"] = kind
        try:
            check(loss, **(arguments | dict(options.get(name, {}))))
        except (InvariantError, LossRaisedError) as error:
            failed[name] = error
        else:
            passed.append(name)
    report = Report(name_of(loss), tuple(passed), failed, tuple(skipped))
    if failed and raises:
        raise InvariantsError(report)
    return report
