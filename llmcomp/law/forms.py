"""The forms of law: which terms are summed over one or two axes, with which exponents. Names, formulas, columns.

What may not live here: data, fitting. A form is linear in its coefficients (a, b, c, d) once its nonlinear parameters
(exponents, and places such as the end of a saturation) are held; projection.py rests on that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Below 0.01 a power law over any range of sizes met in practice is a logarithm; above 10 it is a step after the
# smallest size. Both limits fit as well as their neighbours, so an interval that reaches one is open there.
EXPONENT_RANGE = (0.01, 10.0)
# Places on an axis are sought from a hundredth to a hundred times the geometric mean of the cells.
PLACE_RANGE = (0.01, 100.0)
# Width of the break in units of log x, held: the few steps of a grid do not determine it.
BREAK_WIDTH = 0.25


@dataclass(frozen=True)
class Nonlinear:
    """One nonlinear parameter: an exponent is a pure number, a place lies on the last axis and has its unit, a balance
    is the factor of one term over that of the other."""

    name: str
    kind: Literal["exponent", "place", "balance"] = "exponent"

    @property
    def range(self) -> tuple[float, float]:
        """Where it is sought, with every axis in units of its geometric mean."""
        return EXPONENT_RANGE if self.kind == "exponent" else PLACE_RANGE


ALPHA, BETA, GAMMA = Nonlinear("alpha"), Nonlinear("beta"), Nonlinear("gamma")
TAU, BREAK = Nonlinear("tau", "place"), Nonlinear("break", "place")
BALANCE = Nonlinear("balance", "balance")

# (nonlinear parameters [..., q], logarithms of the axes, each [n]) -> the columns without the intercept, each [..., n].
Columns = Callable[[Array, tuple[Array, ...]], list[Array]]
# (nonlinear parameters [..., q], mean logarithms of the axes) -> logarithm of every column's unit, each [...]: what
# turns the coefficient of a column in x over its geometric mean into that of a column in x.
Units = Callable[[Array, tuple[float, ...]], list[Array]]


@dataclass(frozen=True)
class Form:
    """An intercept a or none, and terms in one axis x or two, x and y."""

    name: str
    template: str  # right-hand side of the formula, with {x} and {y} for the axes' letters
    columns: Columns
    units: Units
    terms: tuple[str, ...] = ("b", "c")  # coefficients of the columns
    nonlinear: tuple[Nonlinear, ...] = (ALPHA, BETA)
    intercept: bool = True
    any_sign: tuple[str, ...] = ()  # coefficients that may be negative; the others are held at or above 0
    n_axes: int = 2

    @property
    def coefficients(self) -> tuple[str, ...]:
        return ("a",) * self.intercept + self.terms

    @property
    def names(self) -> tuple[str, ...]:
        """All free parameters, coefficients first."""
        return self.coefficients + tuple(one.name for one in self.nonlinear)

    @property
    def n_free(self) -> int:
        return len(self.names)

    @property
    def formula(self) -> str:
        return self.formula_of(("P", "S") if self.n_axes == 2 else ("X",))

    def formula_of(self, letters: tuple[str, ...]) -> str:
        return f"CR({', '.join(letters)}) = {self.template.format(**dict(zip('xy', letters, strict=False)))}"

    def nonlinear_units(self, theta: Array, means: tuple[float, ...]) -> Array:
        """Logarithms [..., q] of what turns nonlinear parameters of axes over their geometric means into plain ones."""
        logs = np.zeros(theta.shape)
        for i, one in enumerate(self.nonlinear):
            if one.kind == "place":
                logs[..., i] = means[-1]
            elif one.kind == "balance":
                logs[..., i] = theta[..., 1] * means[1] - theta[..., 0] * means[0]
        return logs

    def term_of(self, nonlinear: str) -> str:
        """The coefficient without which a nonlinear parameter has no meaning."""
        return "b" if nonlinear == "alpha" or "c" not in self.terms else "c"


def _power(exponent: Array, log_x: Array) -> Array:
    return np.asarray(np.exp(-exponent[..., None] * log_x))


def _additive(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    return [_power(theta[..., i], log_x) for i, log_x in enumerate(logs)]


def _additive_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    return [theta[..., i] * mean for i, mean in enumerate(means)]


def _interaction(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    by_x, by_y = _additive(theta, logs)
    return [by_x, by_y, by_x * by_y]


def _interaction_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    x, y = _additive_units(theta, means)
    return [x, y, x + y]


def _upturn(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    by_x, by_y = _additive(theta, logs)
    return [by_x, by_y, np.broadcast_to(np.exp(logs[1] - logs[0]), by_x.shape)]


def _upturn_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    x, y = _additive_units(theta, means)
    return [x, y, np.full_like(x, means[0] - means[1])]


def _multiplicative(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    by_x, by_y = _additive(theta, logs)
    return [by_x * by_y]


def _multiplicative_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    x, y = _additive_units(theta, means)
    return [x + y]


def _saturating(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    with np.errstate(under="ignore"):
        last = np.exp(-np.exp(logs[-1]) / theta[..., -1:])
    return [*_additive(theta, logs[:-1]), last]


def _saturating_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    return [*_additive_units(theta, means[:-1]), np.zeros_like(theta[..., -1])]


def _broken(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    before, after, place = (theta[..., i, None] for i in (-3, -2, -1))
    softplus = np.logaddexp(0.0, (logs[-1] - np.log(place)) / BREAK_WIDTH)
    return [
        *_additive(theta, logs[:-1]),
        np.exp(-before * logs[-1] - (after - before) * BREAK_WIDTH * softplus),
    ]


def _broken_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    return [*_additive_units(theta, means[:-1]), theta[..., -3] * means[-1]]


def _scaled(theta: Array, logs: tuple[Array, ...]) -> list[Array]:
    by_x, by_y = _additive(theta, logs)
    return [by_x + theta[..., 2:3] * by_y]


def _scaled_units(theta: Array, means: tuple[float, ...]) -> list[Array]:
    return [theta[..., 0] * means[0]]


_BROKEN = f"{{}}^-{{}} (1 + ({{}}/break)^{1 / BREAK_WIDTH:g})^(({{}} - {{}})/{1 / BREAK_WIDTH:g})"

FORMS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            # Hoffmann et al. 2022 (arXiv 2203.15556), eq. 2, with steps for tokens; the published law of the ratio.
            Form("additive", "a + b {x}^-alpha + c {y}^-beta", _additive, _additive_units),
            # Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.6: no irreducible term.
            Form("kaplan", "b {x}^-alpha + c {y}^-beta", _additive, _additive_units, intercept=False),
            Form(
                "interaction", "a + b {x}^-alpha + c {y}^-beta + d {x}^-alpha {y}^-beta",
                _interaction, _interaction_units, terms=("b", "c", "d"), any_sign=("d",),
            ),
            Form(
                "multiplicative", "a + b {x}^-alpha {y}^-beta", _multiplicative, _multiplicative_units, terms=("b",)
            ),
            # Small models get worse late: a term that grows with the steps and shrinks with the size.
            Form(
                "upturn", "a + b {x}^-alpha + c {y}^-beta + d {y} / {x}",
                _upturn, _upturn_units, terms=("b", "c", "d"),
            ),
            # Steps stop to help at a time constant tau: the exponential learning curve of Viering and Loog 2021
            # (arXiv 2103.10948, table 1, exp3) in place of the power of the steps.
            Form(
                "saturating", "a + b {x}^-alpha + c exp(-{y}/tau)",
                _saturating, _saturating_units, nonlinear=(ALPHA, TAU),
            ),
            # Caballero et al. 2022 (arXiv 2210.14891), eq. 1, with one break in the steps of a held width.
            Form(
                "broken", "a + b {x}^-alpha + c " + _BROKEN.format("{y}", "beta", "{y}", "beta", "gamma"),
                _broken, _broken_units, nonlinear=(ALPHA, BETA, GAMMA, BREAK),
            ),
            # The additive law as Hoffmann et al. fitted theirs: Huber's loss, threshold 1e-3, on the logarithm.
            Form("chinchilla", "a + b {x}^-alpha + c {y}^-beta", _additive, _additive_units),
        )
    }
)  # fmt: skip

# The additive law with c = b * balance: what several data sets share when they differ by a shift and a factor only.
SCALED = Form(
    "scaled", "a + b ({x}^-alpha + balance {y}^-beta)", _scaled, _scaled_units, ("b",), (ALPHA, BETA, BALANCE)
)

FORMS_OF_ONE_AXIS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            Form("additive", "a + b {x}^-alpha", _additive, _additive_units, ("b",), (ALPHA,), n_axes=1),
            Form("kaplan", "b {x}^-alpha", _additive, _additive_units, ("b",), (ALPHA,), False, n_axes=1),
            Form("saturating", "a + b exp(-{x}/tau)", _saturating, _saturating_units, ("b",), (TAU,), n_axes=1),
            Form(
                "broken", "a + b " + _BROKEN.format("{x}", "alpha", "{x}", "alpha", "gamma"),
                _broken, _broken_units, ("b",), (ALPHA, GAMMA, BREAK), n_axes=1,
            ),
            Form("chinchilla", "a + b {x}^-alpha", _additive, _additive_units, ("b",), (ALPHA,), n_axes=1),
        )
    }
)  # fmt: skip
