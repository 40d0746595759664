"""The search for a counterexample, and how one is reported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor, nn

Loss: TypeAlias = Callable[..., Tensor]
Example: TypeAlias = dict[str, Any]


class _Counterexample(Exception):  # noqa: N818
    def __init__(
        self, invariant: str, formula: str, loss: str, problem: str, example: Mapping[str, object]
    ) -> None:
        self.invariant, self.formula, self.loss = invariant, formula, loss
        self.problem, self.example = problem, example
        # The cause is in the first line, the only one that a summary of pytest has.
        lines = [f"{invariant}: {problem}", f"  loss: {loss}", f"  should hold: {formula}"]
        lines += ["  smallest example:"]
        lines += [f"    {name} = {show(value)}" for name, value in example.items()]
        super().__init__("\n".join(lines))


class InvariantError(_Counterexample, AssertionError):
    """An invariant that a loss does not keep.

    Args:
        invariant: name of the invariant.
        formula: what should hold.
        loss: name of the loss.
        problem: what was found instead.
        example: the inputs by name, the smallest that hypothesis found.
    """


class LossRaisedError(_Counterexample, RuntimeError):
    """A loss that raised, or returned no scalar tensor; the exception is its `__cause__`.

    Args:
        invariant: name of the invariant that was being checked.
        formula: what should hold.
        loss: name of the loss.
        problem: type and message of the exception.
        example: the inputs by name, the smallest that hypothesis found.
    """


for _error in (InvariantError, LossRaisedError):
    _error.__module__ = "c2bin_ext.testing"  # where users import it, and short in a summary


class _Falsified(Exception):  # noqa: N818
    def __init__(self, example: Example, problem: str) -> None:
        self.example, self.problem = example, problem


class _Raised(Exception):  # noqa: N818
    def __init__(self, error: Exception) -> None:
        self.error, self.example = error, Example()


class _NoScalarError(TypeError):
    pass


def search(
    invariant: str,
    formula: str,
    loss: Callable[..., object] | str,
    examples: st.SearchStrategy[Example],
    problem: Callable[[Example], str | None],
    *,
    max_examples: int = 50,
    derandomize: bool = True,
) -> None:
    """Look for an example with a problem, shrink it and raise: what every check is made of.

    Formula: `problem(example) is None` for all examples. Calls of the loss inside `problem` go
    through `evaluate`, so that its exceptions are told from violations.

    Args:
        invariant: name for the report.
        formula: what should hold, for the report.
        loss: what is checked, or its name.
        examples: strategy of dicts from the names of inputs to their values.
        problem: says what is wrong with an example, None where nothing is. It must not change it.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: an example has a problem, or the loss differs from call to call.
        LossRaisedError: the loss raised.

    Examples:
        >>> from hypothesis import strategies as st
        >>> from c2bin_ext.testing import assignments, search
        >>> examples = st.fixed_dictionaries({"view": assignments(rows=2, clusters=2)})
        >>> def hard(example):
        ...     return None if example["view"].max() == 1 else "no entry is 1"
        >>> search("hard", "max P = 1", max, examples, hard)
        Traceback (most recent call last):
        ...
        c2bin_ext.testing.InvariantError: hard: no entry is 1
          loss: max
          should hold: max P = 1
          smallest example:
            view = torch.tensor([[1/2, 1/2], [1/2, 1/2]])

    Source: hypothesis, MacIver et al., "Hypothesis: A new approach to property-based testing".
    """
    __tracebackhide__ = True
    last: list[Example] = []

    def holds(example: Example) -> None:
        last[:] = [example]
        try:
            found = problem(example)
        except _Raised as raised:
            raised.example = example
            raise
        if found is not None:
            raise _Falsified(example, found)

    configured = settings(
        max_examples=max_examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
    )
    cause: Exception | None = None
    with _no_constants():
        try:
            configured(given(examples)(holds))()
        except _Falsified as failure:
            found, example = failure.problem, failure.example
        except _Raised as raised:
            cause, example = raised.error, raised.example
            found = " ".join(str(cause).split())
            if not isinstance(cause, _NoScalarError):
                found = f"the loss raised {type(cause).__name__}: {found}"
        except Flaky:
            found, example = "a problem at one call and none at the next", last[0]
        else:
            return
    # Outside the handlers, so that hypothesis' frames are not part of the traceback.
    if cause is not None:
        raise LossRaisedError(invariant, formula, name_of(loss), found, example) from cause
    raise InvariantError(invariant, formula, name_of(loss), found, example)


@contextmanager
def calling() -> Iterator[None]:
    """Mark a call of the loss under test: its exceptions are not those of the check."""
    __tracebackhide__ = True
    try:
        yield
    except Exception as error:
        raise _Raised(error) from error


def evaluate(loss: Loss, inputs: Sequence[Tensor]) -> Tensor:
    """Call the loss under test on copies of the inputs, for checks made with `search`.

    Formula: `L(x)`. A loss may write into what it is given, and an exception that it raises is told
    from one of the check.

    Args:
        loss: the loss.
        inputs: its arguments.

    Returns:
        The loss, a tensor of one element.

    Raises:
        Exception: inside `search`, whatever the loss raised; `search` makes it a `LossRaisedError`.

    Examples:
        >>> import torch
        >>> from c2bin_ext.testing import evaluate
        >>> evaluate(torch.sum, [torch.eye(2)])
        tensor(2.)

    Source: the page on the testing kit.
    """
    __tracebackhide__ = True
    with calling():
        return _scalar(loss(*(tensor.detach().clone() for tensor in inputs)))


def differentiate(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and its gradient for each input, None where it does not depend on one."""
    __tracebackhide__ = True
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with calling():
        value = _scalar(loss(*leaves))
        if not value.requires_grad:
            return value, [None] * len(leaves)
        return value.detach(), list(torch.autograd.grad(value.sum(), leaves, allow_unused=True))


def name_of(loss: Callable[..., object] | str) -> str:
    """Return how to call a loss in a message: short, and with the line for a lambda."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, nn.Module):
        text = " ".join(repr(loss).split())
        return text if len(text) <= 160 else f"{type(loss).__name__}(...)"
    text = getattr(loss, "__name__", None) or " ".join(repr(loss).split())
    code = getattr(loss, "__code__", None)
    if text == "<lambda>" and code is not None:
        return f"the lambda in {Path(code.co_filename).name}, line {code.co_firstlineno}"
    return str(text)


def _scalar(value: object) -> Tensor:
    what = "expected the loss to return a scalar tensor"
    if not isinstance(value, Tensor):
        raise _NoScalarError(f"{what}, got {type(value).__name__}")
    if value.numel() != 1:
        raise _NoScalarError(f"{what}, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise _NoScalarError(f"{what} of floating point, got {value.dtype}")
    return value


def _no_constants() -> AbstractContextManager[object]:
    # Hypothesis mixes constants of the modules that happen to be loaded into what it draws, and
    # caches them in the working directory. Examples must not depend on what else is imported.
    providers = sys.modules.get("hypothesis.internal.conjecture.providers")
    if providers is None or not hasattr(providers, "_get_local_constants"):
        return nullcontext()
    cache, none = providers.CONSTANTS_CACHE, providers.Constants()
    return patch.multiple(
        providers,
        _get_local_constants=lambda: none,
        CONSTANTS_CACHE=type(cache)(cache.max_size),
    )


def show(value: object) -> str:
    """Return Python that makes a value again, with simple fractions in place of decimals."""
    if not isinstance(value, Tensor):
        return repr(value)
    cells = value.detach().cpu().reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)
    rows = [f"[{', '.join(_number(cell) for cell in row)}]" for row in cells]
    dtype = "" if value.dtype is torch.float32 else f", dtype={value.dtype}"
    if value.ndim < 2:
        text = rows[0][1:-1] if not value.ndim else ", ".join(row[1:-1] for row in rows)
        return f"torch.tensor({text if not value.ndim else f'[{text}]'}{dtype})"
    joined = ", ".join(rows)
    if len(joined) > 70:
        joined = ("," + "\n" + " " * 8).join(rows)
        joined = "\n" + " " * 8 + joined + "\n" + " " * 4
    return f"torch.tensor([{joined}]{dtype})"


def _number(cell: Tensor) -> str:
    value = cell.item()
    if not torch.isfinite(cell):
        return f"float('{value}')"
    simple = Fraction(value).limit_denominator(64)
    # Arithmetic on float64 leaves thirds and sixths a unit in the last place off.
    slack = 4e-16 * abs(value) if cell.dtype is torch.float64 else 0.0
    rounded = torch.tensor(float(simple), dtype=cell.dtype).item()
    if simple and abs(rounded - value) <= slack:
        return str(simple) if simple.denominator > 1 or abs(simple) < 1e6 else repr(value)
    if not value:
        return "0"
    return f"{value:.9g}" if cell.dtype is not torch.float64 else repr(value)
