"""All invariants of a kind at once, or one by one under pytest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from c2bin_ext.testing._invariants import ALL, REGISTRY, Kind
from c2bin_ext.testing._search import InvariantError, Loss, LossRaisedError, name_of
from c2bin_ext.testing.presets import Preset


@dataclass(frozen=True)
class Report:
    """Which invariants a `loss` keeps: `passed`, `skipped`, and by name the error of each `failed`.

    It prints with the smallest example of each that does not hold.
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
    """Some invariants of a loss do not hold: the `report` says which."""

    __module__ = "c2bin_ext.testing"

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(str(report))


def invariants(kind: Kind) -> tuple[str, ...]:
    """Name the invariants of one `kind` of loss, for `only` and `skip`.

    Args:
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.

    Returns:
        The names, in the order of a report.

    Raises:
        ValueError: an unknown kind.

    Source: the table of the page on the testing kit.

    Examples:
        >>> invariants("assignment")[:3]
        ('instance_permutation', 'cluster_relabelling', 'every_input_matters')
    """
    if kind not in ALL:
        raise ValueError(f"kind: expected one of {ALL}, got {kind!r}")
    of_statistics = "additive_over_shards"
    return tuple(n for n, found in REGISTRY.items() if kind in found.kinds and n != of_statistics)


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

    Source: the table of the page on the testing kit.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> check_invariants(ClusterEntropyRegularizer(), "assignment", max_examples=20).passed[:2]
        ('instance_permutation', 'cluster_relabelling')
    """
    __tracebackhide__ = True
    search = {"max_examples": max_examples, "derandomize": derandomize, "shapes": shapes}
    checks = _chosen(kind, preset, only, skip, options, device=device, **search)
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
        TypeError: the test takes no `check`.
        ValueError: a name or kind that does not exist.

    Source: after scikit-learn's `parametrize_with_checks`.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> @parametrize_with_invariants(ClusterEntropyRegularizer(), "assignment")
        ... def test_regularizer(loss, check):
        ...     check(loss)
    """
    try:
        import pytest
    except ImportError as error:
        raise ImportError(f"expected pytest ({error}): pip install pytest") from error

    def one(invariant: Callable[[Loss], None]) -> Callable[..., None]:
        def check(other: Loss = loss) -> None:
            __tracebackhide__ = True
            invariant(other)

        return check

    checks = _chosen(kind, **arguments)

    def decorate(test: Callable[..., None]) -> Any:
        parameters = inspect.signature(test).parameters
        taken = [name for name in ("loss", "check", "invariant") if name in parameters]
        if not {"check", "invariant"} & set(taken):
            raise TypeError(f"{name_of(test)}: expected the parameter `check`, got {taken}")
        rows = [{"loss": loss, "check": one(c), "invariant": n} for n, c in checks.items()]
        values = [tuple(row[name] for name in taken) for row in rows]
        return pytest.mark.parametrize(taken, values, ids=list(checks))(test)

    return decorate


def _chosen(
    kind: Kind,
    preset: Preset | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **search: Any,
) -> dict[str, Callable[[Loss], None]]:
    names, preset, options = invariants(kind), preset or Preset(), options or {}
    for argument, given in (("only", only or ()), ("skip", skip), ("options", options)):
        if isinstance(given, str) or (unknown := sorted(set(given) - set(names))):
            wrong = given if isinstance(given, str) else unknown
            raise ValueError(f"{argument}: expected names out of {names}, got {wrong!r}")
    chosen: dict[str, Callable[[Loss], None]] = {}
    for name in names:
        if name not in skip and (name not in preset.skip if only is None else name in only):
            own = {**preset.options.get(name, {}), **options.get(name, {})}
            search["min_rows"] = preset.min_rows
            chosen[name] = partial(REGISTRY[name], kind=kind, **search, **own)
    return chosen


def table() -> str:
    """Return the invariants as the table that the docs have."""
    lines = ["| name | what holds | kinds | options |", "| --- | --- | --- | --- |"]
    for name, invariant in REGISTRY.items():
        kinds = ", ".join({ALL[0]: "A", ALL[1]: "AA", ALL[2]: "EE"}[k] for k in invariant.kinds)
        options = ", ".join(f"`{o}`" for o in invariant.options if o not in ("rtol", "atol"))
        lines.append(f"| `{name}` | {invariant.what} | {kinds} | {options} |")
    return "\n".join(lines)
