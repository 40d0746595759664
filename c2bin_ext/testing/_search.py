"""The search for a counterexample, and how one is reported."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias, cast
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor

Loss: TypeAlias = Callable[..., Tensor]
Example: TypeAlias = dict[str, Any]
PHASES = [Phase.generate, Phase.shrink]


class _Counterexample(Exception):  # noqa: N818
    def __init__(self, invariant: str, formula: str, loss: str, problem: str, example: Example):
        self.invariant, self.formula, self.loss = invariant, formula, loss
        self.problem, self.example = problem, example
        # The cause is in the first line, the only one that a summary of pytest has.
        head = [f"{invariant}: {problem}", f"  loss: {loss}", f"  should hold: {formula}"]
        lines = [*head, "  smallest example:"]
        lines += [f"    {name} = {show(value)}" for name, value in example.items()]
        super().__init__("\n".join(lines))


class InvariantError(_Counterexample, AssertionError):
    """An `invariant` whose `formula` a `loss` does not keep: the `problem`, and an `example`."""

    __module__ = "c2bin_ext.testing"  # where users import it, and short in a summary


class LossRaisedError(_Counterexample, RuntimeError):
    """A `loss` that raised or returned no scalar, as InvariantError; `__cause__` is the error."""

    __module__ = "c2bin_ext.testing"


class _Falsified(Exception): ...  # noqa: N818


class _Raised(Exception): ...  # noqa: N818


class _NoScalarError(TypeError): ...


def search(
    invariant: str,
    formula: str,
    loss: Callable[..., object],
    examples: st.SearchStrategy[Any],
    problem: Callable[[Any], str | None],
    *,
    max_examples: int = 50,
    derandomize: bool = True,
) -> None:
    """Look for an example with a problem, shrink it and raise: for checks of one's own.

    Formula: `problem(example) is None` for all examples. Calls of the loss inside `problem` go
    through `evaluate`, so that its exceptions are told from violations. Source: hypothesis.

    Args:
        invariant: name for the report, like formula, what should hold, and loss, what is checked.
        examples: strategy of dicts from the names of inputs to their values.
        problem: says what is wrong with an example, None where nothing is. It must not change it.
        max_examples: how many to try before shrinking; derandomize tries the same at every run.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: an example has a problem, or the loss differs from call to call.
        LossRaisedError: the loss raised.

    Examples:
        >>> from c2bin_ext.testing import assignments
        >>> examples = st.fixed_dictionaries({"view": assignments(rows=2, clusters=2)})
        >>> search("sums", "Σ_k P[i, k] = 1", max, examples, lambda example: None)
    """
    __tracebackhide__ = True
    last, found, cause = Example(), "", None

    def holds(example: Example) -> None:
        nonlocal last, found
        last, found = example, ""
        if found := problem(example) or "":
            raise _Falsified

    # A loss is checked as often as that, whatever hypothesis thinks of it, and nothing is kept.
    options: dict[str, Any] = {"max_examples": max_examples, "derandomize": derandomize}
    options |= {"database": None, "deadline": None, "report_multiple_bugs": False}
    options |= {"verbosity": Verbosity.quiet, "print_blob": False}
    options |= {"suppress_health_check": [*HealthCheck], "phases": PHASES}
    with _no_constants():
        try:
            settings(**options)(given(examples)(holds))()
        except _Falsified:
            pass
        except _Raised as raised:
            cause = raised.__cause__
            found = " ".join(str(cause).split())
            if type(cause) is not _NoScalarError:
                found = f"the loss raised {type(cause).__name__}: {found}"
        except Flaky:
            found = "a problem at one call and none at the next"
        else:
            return
    # Outside the handlers, so that hypothesis' frames are not part of the traceback.
    error = InvariantError if cause is None else LossRaisedError
    raise error(invariant, formula, name_of(loss), found, last) from cause


@contextmanager
def calling() -> Iterator[None]:
    """Mark a call of the loss under test: its exceptions are not those of the check."""
    __tracebackhide__ = True
    try:
        yield
    except Exception as error:
        raise _Raised from error


def evaluate(loss: Loss, inputs: Sequence[Tensor]) -> Tensor:
    """Call the loss under test on copies of the inputs, for checks made with `search`.

    Formula: `L(x)`. Source: the page on the testing kit.

    Args:
        loss: the loss, which may write into what it is given: copies of the `inputs`.

    Returns:
        The loss, a tensor of one element.

    Raises:
        Exception: what `search` takes for an exception of the loss.

    Examples:
        >>> evaluate(torch.sum, [torch.eye(2)])
        tensor(2.)
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


def name_of(loss: Callable[..., object]) -> str:
    """Return how to call a loss in a message: short, and with the line for a lambda."""
    text = " ".join((getattr(loss, "__name__", None) or repr(loss)).split())
    if text == "<lambda>" and (code := getattr(loss, "__code__", None)) is not None:
        return f"the lambda in {Path(code.co_filename).name}, line {code.co_firstlineno}"
    return text if len(text) <= 160 else f"{type(loss).__name__}(...)"


def _scalar(value: object) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return value
    got = f"{value.dtype}, {value.shape}" if isinstance(value, Tensor) else type(value).__name__
    raise _NoScalarError(f"expected the loss to return a scalar tensor, got {got}")


def _no_constants() -> AbstractContextManager[object]:
    # Hypothesis mixes constants of the modules that happen to be loaded into what it draws, and
    # caches them in the working directory. Examples must not depend on what else is imported.
    providers: Any = sys.modules.get("hypothesis.internal.conjecture.providers")
    if not hasattr(providers, "_get_local_constants"):
        return nullcontext()
    constants, cache = providers.Constants(), type(providers.CONSTANTS_CACHE)(1)
    new = {"_get_local_constants": lambda: constants, "CONSTANTS_CACHE": cache}
    return cast("AbstractContextManager[object]", patch.multiple(providers, **new))


def show(value: object) -> str:
    """Return Python that makes a value again, with simple fractions in place of decimals."""
    if not isinstance(value, Tensor):
        return repr(value)

    def text(cell: Any) -> str:
        if isinstance(cell, list):
            return f"[{', '.join(map(text, cell))}]"
        if not math.isfinite(cell):
            return f"float('{cell}')"
        simple = Fraction(cell).limit_denominator(64)
        again = torch.tensor(float(simple), dtype=value.dtype).item()
        # Arithmetic on float64 leaves thirds and sixths a unit in the last place off.
        if abs(simple) < 1e6 and math.isclose(again, cell, rel_tol=4e-16):
            return str(simple)
        return repr(cell) if value.dtype is torch.float64 else f"{cell:.9g}"

    dtype = "" if value.dtype is torch.float32 else f", dtype={value.dtype}"
    return f"torch.tensor({text(value.tolist())}{dtype})"
