"""All invariants of a kind at once, one by one under pytest, and one by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from c2bin_ext.testing._invariants import ALL, REGISTRY, Check, Kind, Search
from c2bin_ext.testing._search import InvariantError, Loss, LossRaisedError, name_of
from c2bin_ext.testing.presets import Preset

SEARCH = fields(Search)


@dataclass(frozen=True)
class Report:
    """Which invariants a loss keeps; prints with the smallest example of each that it does not.

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
        for error in self.failed.values():
            lines += [line for line in str(error).split("\n") if not line.startswith("  loss: ")]
        for what, names in (("hold", self.passed), ("skipped", self.skipped)):
            lines += [f"{what}: {', '.join(names)}"] if names else []
        return "\n  ".join(lines)


class InvariantsError(AssertionError):
    """Some invariants of a loss do not hold.

    Args:
        report: what was found, also for those that do.
    """

    __module__ = "c2bin_ext.testing"

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(str(report))


def invariants(kind: Kind) -> tuple[str, ...]:
    """Name the invariants of one kind of loss, for `only` and `skip`.

    Args:
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.

    Returns:
        The names, in the order of a report.

    Raises:
        ValueError: an unknown kind.

    Examples:
        >>> from c2bin_ext.testing import invariants
        >>> invariants("assignment")[:3]
        ('instance_permutation', 'cluster_relabelling', 'every_input_matters')

    Source: the table of the page on the testing kit.
    """
    if kind not in ALL:
        raise ValueError(f"kind: expected one of {ALL}, got {kind!r}")
    return tuple(n for n, found in REGISTRY.items() if kind in found.kinds and found.of_losses)


def check_invariants(
    loss: Loss,
    kind: Kind = "assignment_pair",
    *,
    preset: Preset | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    raises: bool = True,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Sequence[tuple[int, int]] | None = None,
    device: str | torch.device = "cpu",
) -> Report:
    """Check every invariant of a kind of loss, and report all that do not hold.

    Formula: the conjunction of `invariants(kind)`, less `skip`. Additivity over shards is about a
    statistic rather than a loss: see `check_additive_over_shards`.

    Args:
        loss: what to check, any callable that returns a scalar tensor.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        preset: options and skips of a usual form, from `c2bin_ext.testing.presets`.
        only: names of the invariants to check; all of the kind by default.
        skip: names of the invariants that the loss is not meant to keep.
        options: by name of the invariant, its options, such as `{"bounds": {"upper": 2}}`. Bounds
            and values are C2BIN's defaults unless given.
        raises: raise where an invariant does not hold; False leaves that to the caller.
        max_examples: how many examples to try for each invariant.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) or (n, d) to draw from, such as a single one for a compiled loss.
        device: where the inputs lie.

    Returns:
        The report.

    Raises:
        InvariantsError: an invariant does not hold, or the loss raised; has the `report`.
        ValueError: a name, kind or option that does not exist.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import check_invariants
        >>> check_invariants(ClusterEntropyRegularizer(), "assignment", max_examples=20).passed[:2]
        ('instance_permutation', 'cluster_relabelling')

    Source: the table of the page on the testing kit.
    """
    __tracebackhide__ = True
    looking = Search(max_examples, derandomize, shapes, device)
    checks = _chosen(kind, looking, preset=preset, only=only, skip=skip, options=options)
    passed, failed = [], dict[str, InvariantError | LossRaisedError]()
    for name, check in checks.items():
        try:
            check(loss)
        except (InvariantError, LossRaisedError) as error:
            failed[name] = error
        else:
            passed.append(name)
    skipped = tuple(name for name in invariants(kind) if name not in checks)
    report = Report(name_of(loss), tuple(passed), failed, skipped)
    if failed and raises:
        raise InvariantsError(report)
    return report


def parametrize_with_invariants(
    loss: Loss, kind: Kind = "assignment_pair", **arguments: Any
) -> Callable[[Callable[..., None]], Any]:
    """Decorate a test function to be one pytest test for each invariant; needs pytest.

    Formula: the test is called with as many of these as it takes: `loss`; `check`, to be called
    with the loss or with nothing; `invariant`, the name.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        arguments: the other arguments of `check_invariants`.

    Returns:
        The decorator. A test fails with `InvariantError` or `LossRaisedError`.

    Raises:
        ImportError: pytest is not installed.
        TypeError: the test takes neither `check` nor `invariant`.
        ValueError: a name or kind that does not exist.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import parametrize_with_invariants
        >>> @parametrize_with_invariants(ClusterEntropyRegularizer(), "assignment")
        ... def test_regularizer(loss, check):
        ...     check(loss)

    Source: after scikit-learn's `parametrize_with_checks`.
    """
    try:
        import pytest
    except ImportError as error:
        raise ImportError(f"expected pytest ({error}): pip install pytest") from error
    looking = Search(**{f.name: arguments.pop(f.name) for f in SEARCH if f.name in arguments})
    checks = _chosen(kind, looking, **arguments)

    def one(invariant: Check) -> Callable[..., None]:
        def check(other: Loss = loss) -> None:
            __tracebackhide__ = True
            invariant(other)

        return check

    rows = [{"loss": loss, "check": one(found), "invariant": n} for n, found in checks.items()]

    def decorate(test: Callable[..., None]) -> Any:
        parameters = inspect.signature(test).parameters
        taken = [name for name in ("loss", "check", "invariant") if name in parameters]
        if not {"check", "invariant"} & set(taken):
            raise TypeError(
                f"{name_of(test)}: expected the parameter `check`, got {list(parameters)}"
            )
        values = [tuple(row[name] for name in taken) for row in rows]
        return pytest.mark.parametrize(taken, values, ids=list(checks))(test)

    return decorate


def _chosen(
    kind: Kind,
    looking: Search,
    *,
    preset: Preset | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Check]:
    names, preset, options = invariants(kind), preset or Preset(), options or {}
    for argument, given in (("only", only or ()), ("skip", skip), ("options", options)):
        if isinstance(given, str) or (unknown := sorted(set(given) - set(names))):
            wrong = given if isinstance(given, str) else unknown
            raise ValueError(f"{argument}: expected names out of {names}, got {wrong!r}")
    looking = replace(looking, min_rows=max(preset.min_rows, looking.min_rows))
    return {
        name: Check(
            *(REGISTRY[name], kind, looking),
            **{**preset.options.get(name, {}), **options.get(name, {})},
        )
        for name in names
        if name not in skip and (name not in preset.skip if only is None else name in only)
    }


def check_one(name: str) -> Callable[..., None]:
    """Return `check_<name>(loss, kind, **options)`, with the options of a search among them."""
    invariant = REGISTRY.get(name.removeprefix("check_"))
    if invariant is None or not name.startswith("check_"):
        raise AttributeError(f"module 'c2bin_ext.testing' has no attribute {name!r}")
    usual = ALL[1] if ALL[1] in invariant.kinds and invariant.of_losses else invariant.kinds[0]

    def check(loss: Callable[..., Any], kind: str = usual, **options: Any) -> None:
        __tracebackhide__ = True
        looking = Search(**{f.name: options.pop(f.name) for f in SEARCH if f.name in options})
        Check(invariant, kind, looking, **options)(loss)

    check.__name__, check.__doc__ = name, f"Check: {invariant.what}."
    return check


def table() -> str:
    """Return the invariants as the table that the docs have."""
    short = dict(zip(ALL, ("A", "AA", "EE"), strict=True))
    lines = ["| name | what holds | kinds | options |", "| --- | --- | --- | --- |"]
    for name, invariant in REGISTRY.items():
        kinds = ", ".join(short[kind] for kind in invariant.kinds)
        options = ", ".join(f"`{o}`" for o in invariant.options if o not in ("rtol", "atol"))
        lines.append(f"| `{name}` | {invariant.what} | {kinds} | {options} |")
    return "\n".join(lines)
