"""All invariants of a kind at once, or one by one under pytest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from c2bin_ext.testing._invariants import ALL, REGISTRY, SHARDS, Kind
from c2bin_ext.testing._search import InvariantError, Loss, LossRaisedError, name_of
from c2bin_ext.testing.presets import Preset


@dataclass(frozen=True)
class Report:
    """Which invariants a `loss` keeps, and by name the error, with an example, of each `failed`."""

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
        The names, in the order of a report and of the docs' table. Source: that table.

    Raises:
        ValueError: an unknown kind.

    Examples:
        >>> invariants("assignment")[:3]
        ('instance_permutation', 'cluster_relabelling', 'every_input_matters')
    """
    if kind not in ALL:
        raise ValueError(f"kind: expected one of {ALL}, got {kind!r}")
    return tuple(n for n, found in REGISTRY.items() if kind in found.kinds and n != SHARDS)


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

    Formula: the conjunction of `invariants(kind)`, less `skip`. Source: the testing kit's page.

    Args:
        loss: what to check, any callable that returns a scalar tensor.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        preset: options and skips of a usual form, from `c2bin_ext.testing.presets`.
        only: names of the invariants to check, of all of the kind; skip names those not to.
        options: by name of the invariant, its options, such as `{"bounds": {"upper": 2}}`.
        raises: raise where an invariant does not hold; False leaves that to the caller.
        max_examples: to try for each; derandomize tries the same at every run.
        shapes: the (n, K) or (n, d) to draw from, such as a single one for a compiled loss.
        device: where the inputs lie.

    Returns:
        The report.

    Raises:
        InvariantsError: an invariant does not hold, or the loss raised; has the `report`.
        ValueError: a name, kind or option that does not exist.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> check_invariants(ClusterEntropyRegularizer(), "assignment", max_examples=20).passed[:2]
        ('instance_permutation', 'cluster_relabelling')
    """
    __tracebackhide__ = True
    search = {"max_examples": max_examples, "derandomize": derandomize, "shapes": shapes}
    checks = _chosen(kind, preset, only, skip, options, device=device, **search)
    failed: dict[str, InvariantError | LossRaisedError] = {}
    for name, check in checks.items():
        try:
            check(loss)
        except (InvariantError, LossRaisedError) as error:
            failed[name] = error
    passed = tuple(name for name in checks if name not in failed)
    skipped = tuple(name for name in invariants(kind) if name not in checks)
    report = Report(name_of(loss), passed, failed, skipped)
    if failed and raises:
        raise InvariantsError(report)
    return report


def parametrize_with_invariants(
    loss: Loss, kind: Kind = "assignment_pair", **arguments: Any
) -> Callable[[Callable[..., None]], Any]:
    """Decorate a test function to be one pytest test for each invariant.

    Formula: the test is called with what it takes of `loss`, `check`, to be called with the loss or
    nothing, and `invariant`, the name. Source: scikit-learn's `parametrize_with_checks`.

    Args:
        loss: what to check; kind and arguments are as of `check_invariants`.

    Returns:
        The decorator. A test fails with `InvariantError` or `LossRaisedError`.

    Raises:
        TypeError: the test takes no `check`; ValueError: a name or kind that does not exist.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> @parametrize_with_invariants(ClusterEntropyRegularizer(), "assignment")
        ... def test_regularizer(loss, check):
        ...     check(loss)
    """
    import pytest

    checks = _chosen(kind, **arguments)

    def one(invariant: Callable[[Loss], None]) -> Callable[..., None]:
        def check(other: Loss = loss) -> None:
            __tracebackhide__ = True
            invariant(other)

        return check

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
        wrong = given if isinstance(given, str) else sorted(set(given) - set(names))
        if wrong:
            raise ValueError(f"{argument}: expected names out of {names}, got {wrong!r}")
    search |= {"kind": kind, "min_rows": preset.min_rows}
    options = (preset | Preset(options=options)).options
    chosen = set(names) - preset.skip if only is None else set(only)
    return {
        name: partial(REGISTRY[name], **search, **options.get(name, {}))
        for name in names
        if name in chosen and name not in skip
    }
