"""Every number of a study as one row of one long table: where it was measured, what it is called, its value.

Cells of a study return rows; tables, figures, the answer and the verdict's evidence are selections of them. A key is a
key of `QUANTITIES`, so that a number without a unit and a definition cannot be made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypeAliasType

from crosscoder.results.quantities import QUANTITIES, unknown_key

Site = Literal["write", "residual"]
State = Literal["trained", "untrained", "shuffled", "gaussian", "frozen_encoder", "frozen_decoder", "soft_decoder"]
"""Of what is measured: the subject, trained or not; a null in place of its activations (shuffled, gaussian); or a
dictionary that is not all learnt, on the trained subject (the last three)."""
Arm = Literal["crosscoder", "layerwise"]
Role = Literal["main", "size", "k", "calibration"]
SITES: tuple[Site, ...] = ("write", "residual")
SITE_NAME: dict[str, str] = {"residual": "residual stream", "write": "block writes"}
COMPARED = ("A", "B")
CELL = ("subject", "training_seed", "state", "site", "arm", "role", "n_features", "k")
"""What tells one dictionary of a study from another, its seed apart."""
CONFIDENCE = 0.9
closed = with_config(extra="forbid")
"""Class decorator: what is read from a file has no other fields. The types below are strict: nothing is converted."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
"""Becomes an anchor and a label: no spaces, no markup."""
Text = Annotated[str, Field(strict=True, max_length=10**6)]
"""What UTF-8 can hold."""
Count = Annotated[int, Field(strict=True, ge=0, lt=10**15)]
Integer = Annotated[int, Field(strict=True, gt=-(10**15), lt=10**15)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=-1e30, lt=1e30)]
"""Beyond are nonsense, and sums that overflow."""
Flag = Annotated[bool, Field(strict=True)]
if TYPE_CHECKING:
    Plain = Any
else:
    Plain = TypeAliasType("Plain", "Flag | Integer | Number | Text | list[Plain] | dict[Text, Plain] | None")
"""What JSON can hold."""


@closed
@dataclass(frozen=True)
class Estimate:
    """A value and its interval, of confidence `CONFIDENCE`; where nothing could vary, `low == high == value`."""

    value: Number
    low: Number
    high: Number

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"the interval runs from {self.low} down to {self.high}; give the lower end first")

    @classmethod
    def over(cls, values: Sequence[float]) -> Estimate:
        """Mean and range of values: no confidence interval."""
        return cls(math.fsum(values) / len(values), min(values), max(values))

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    @property
    def finite(self) -> bool:
        """True where value and both ends are finite numbers."""
        return all(math.isfinite(x) for x in (self.value, self.low, self.high))

    def covers(self, value: float) -> bool:
        """True where `value` is in the interval, ends included."""
        return self.low <= value <= self.high

    def inside(self, low: float, high: float) -> bool:
        """True where the whole interval lies in `[low, high]`, ends included."""
        return low <= self.low and self.high <= high


def _equally_long(lists: list[list[Any]]) -> list[list[Any]]:
    if len({len(one) for one in lists}) > 1:
        raise ValueError("expected lists of equally many numbers")
    return lists


Value = bool | int | float | str | Estimate | list[Any] | None
TYPES: dict[str, Any] = {
    "number": Integer | Number | Estimate,
    "share": Annotated[Integer | Number, Field(ge=-1e-9, le=1 + 1e-9)] | Estimate,
    "whole": Count,
    "flag": Flag,
    "text": Text,
    "list": list[Integer | Number | None],
    "texts": list[Text],
    "lists": Annotated[list[list[Integer | Number]], AfterValidator(_equally_long)],
}
"""What a file may say, by `Quantity.value`; a number that is a share is checked as one."""


@cache
def value_type(key: str) -> Any:
    """What a row of a quantity may hold."""
    one = QUANTITIES[key]
    kind: Any = TYPES["share" if (one.value, one.unit) == ("number", "share") else one.value]
    if one.value == "list":
        kind = Annotated[kind, Field(min_length=one.length or 0, max_length=one.length)]
    return kind | None


@closed
@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a number was measured. None: it does not depend on that, or is over all of it."""

    subject: Name | None = None
    training_seed: Count | None = None
    """Position of the subject's training seed in the study's list."""
    state: State | None = None
    site: Site | None = None
    arm: Arm | None = None
    role: Role | None = None
    n_features: Count | None = None
    k: Count | None = None
    seed: Count | None = None
    """Of the dictionary, or of a planted world."""
    layer: Annotated[Text, Field(max_length=64)] | None = None
    estimator: Name | None = None
    kind: Name | None = None
    """Kind of planted feature, or of control."""
    dictionary: Name | None = None
    """The label of one of several dictionaries that are compared."""
    against: Name | None = None
    """Of the dictionary in which its features are sought."""
    feature: Count | None = None
    """Its number in the dictionary."""

    def known(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Row:
    """One number.

    `value` is None where the quantity is undefined or was not measured; `missing` may then say why.
    """

    at: Place
    key: str
    value: Value
    missing: str | None = None

    def __post_init__(self) -> None:
        if self.key not in QUANTITIES:
            raise ValueError(unknown_key(self.key))


def rows_at(at: Place, values: Mapping[str, Value]) -> list[Row]:
    """One row for each value measured at a place; a number that is not finite is None."""
    return [Row(at, key, finite(value)) for key, value in values.items()]


def finite(value: Any) -> Any:
    """`value`, or None for a number or an estimate that is not finite, as JSON can say; a list with its own so."""
    if isinstance(value, list):
        return [finite(one) for one in value]
    if isinstance(value, Estimate):
        return value if value.finite else None
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class LongTable:
    """Rows in the order in which they were measured."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"LongTable({len(self.rows):,} rows of {len(self._by_key):,} quantities)"

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _by_key(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.key, []).append(row)
        return found

    def select(self, key: str | None = None, **where: Any) -> LongTable:
        """The rows of a key and a place. A tuple allows any of its values; None asks that the field is not set."""
        rows: Sequence[Row] = self.rows if key is None else self._by_key.get(key, ())
        return LongTable(tuple(row for row in rows if _fits(row.at, where)))

    def values(self, key: str, **where: Any) -> list[Any]:
        """The values of a key at a place, without those that are None."""
        return [row.value for row in self.select(key, **where) if row.value is not None]

    def one(self, key: str, **where: Any) -> Any:
        """The only value of a key at a place; None where there is none."""
        found = self.select(key, **where)
        if len(found) > 1:
            places = "; ".join(str(row.at.known()) for row in found.rows[:3])
            raise ValueError(f"{len(found)} values of {key} where one was asked for: {places}")
        return found.rows[0].value if found.rows else None

    def known_range(self, key: str, **where: Any) -> Estimate | None:
        """Mean and range over the seeds at a place for which the value is defined; None where there is none.

        Each dictionary seed counts once, whichever training it belongs to. The range is no confidence interval.
        """
        values = [float(value) for value in self.values(key, **where)]
        return Estimate.over(values) if values else None

    def seed_range(self, key: str, **where: Any) -> Estimate | None:
        """`known_range`, or None where the value of a seed is missing."""
        missing = any(row.value is None for row in self.select(key, **where))
        return None if missing else self.known_range(key, **where)

    def seeds(self) -> list[int]:
        """The dictionary seeds that rows are about, in order of appearance."""
        return list(dict.fromkeys(row.at.seed for row in self.rows if row.at.seed is not None))

    def cells(self, key: str | None = None, **where: Any) -> dict[Place, LongTable]:
        """The dictionaries at a place, each with all that was measured of its seeds and layers; those that have `key`.

        Not those of planted worlds.
        """
        where = {"arm": ("crosscoder", "layerwise"), **where}
        return {
            at: cell
            for at, cell in self._cells.items()
            if at.k is not None and _fits(at, where) and (key is None or key in cell._by_key)
        }

    @cached_property
    def _cells(self) -> dict[Place, LongTable]:
        return self.groups(*CELL)

    def groups(self, *names: str) -> dict[Place, LongTable]:
        """Rows by the named fields of their place, in order of appearance; the places hold these fields only."""
        found: dict[Place, list[Row]] = {}
        for row in self.rows:
            at = Place(**{name: getattr(row.at, name) for name in names})
            found.setdefault(at, []).append(row)
        return {at: LongTable(tuple(rows)) for at, rows in found.items()}


def _fits(at: Place, where: dict[str, Any]) -> bool:
    allowed = ((getattr(at, name), wanted) for name, wanted in where.items())
    return all(seen in wanted if isinstance(wanted, tuple) else seen == wanted for seen, wanted in allowed)
