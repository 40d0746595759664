"""Every broken loss of the zoo is caught, and every right one keeps what it is said to keep."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import Phase
from zoo import BROKEN, ONE, PAIR, RIGHT, Broken, Right, two_heads

from c2bin_ext.testing import InvariantError, _search, check_invariants, invariants
from c2bin_ext.testing.presets import Preset, infonce


@pytest.mark.parametrize("broken", BROKEN, ids=[f"{b.kind}-{b.mistake}" for b in BROKEN])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_losses_are_caught(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    # Found is enough: what an example shrinks to is for the tests of the kit.
    monkeypatch.setattr(_search, "PHASES", [Phase.generate])
    report = check_invariants(broken.loss, broken.kind, only=[broken.caught_by], raises=False)
    assert list(report.failed) == [broken.caught_by]


def test_the_zoo_tries_every_invariant() -> None:
    caught = Counter(broken.caught_by for broken in BROKEN)
    assert set(caught) == {name for b in BROKEN for name in invariants(b.kind)}
    assert len(BROKEN) >= 40
    assert len(RIGHT) >= 12


@pytest.mark.parametrize("right", RIGHT, ids=[right.name for right in RIGHT])
def test_right_losses_pass(right: Right) -> None:
    how = {"preset": right.preset, "max_examples": right.max_examples}
    report = check_invariants(right.loss, right.kind, raises=False, **how)
    assert set(report.failed) == right.fails, str(report)
    assert set(report.skipped) == right.preset.skip & set(invariants(right.kind))


def test_an_own_formula_is_not_enough_for_a_wrong_loss() -> None:
    """A preset says what values to expect: another temperature's do not pass for them."""
    right = next(r for r in RIGHT if r.name.startswith("BCAContrastiveLoss(0.1"))
    how = {"preset": infonce(0.2, symmetric=False), "max_examples": 10}
    report = check_invariants(right.loss, PAIR, raises=False, **how)
    assert list(report.failed) == ["follows_formula"]
    assert isinstance(report.failed["follows_formula"], InvariantError)


def test_presets_add_up() -> None:
    one = Preset(frozenset({"dtype"}), {"bounds": {"lower": 0}, "finite": {"dtypes": []}}, 3)
    two = Preset(frozenset({"finite"}), {"bounds": {"lower": 1, "upper": 2}})
    both = one | two
    assert both.skip == {"dtype", "finite"}
    assert both.options == {"bounds": {"lower": 1, "upper": 2}, "finite": {"dtypes": []}}
    assert (both.min_rows, (two | Preset(min_rows=4)).min_rows) == (3, 4)


def test_rows_that_a_loss_needs() -> None:
    seen = set()

    def loss(view: torch.Tensor) -> torch.Tensor:
        seen.add(len(view))
        return view.sum()

    check_invariants(loss, ONE, preset=Preset(min_rows=5), raises=False, max_examples=10)
    assert min(seen) == 5


def test_a_formula_of_ones_own() -> None:
    view = torch.eye(3, dtype=torch.float64)
    assert two_heads(view, view).item() == pytest.approx(
        torch.tensor(2 / torch.e**2).log1p().item()
    )
