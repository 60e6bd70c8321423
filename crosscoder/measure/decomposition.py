"""Where the factor of two goes: shares of ln 2 by load, persistence, geometry and width, in two ledgers that add up.

B has a quarter of A's layers and twice its width, so equal parameters and half the joint dimensions. Were loads equal
and room proportional to dimensions, B would be twice as crowded. The layers' ledger says where that goes when each
layer is counted by its own bank; the joint ledger when all layers are one room. They share the load alone, so shares of
the one are not to be added to those of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crosscoder.measure.room import RoomLaw
from crosscoder.measure.statistics import linear_combination
from crosscoder.results.table import Estimate

LN2, LN4 = math.log(2), math.log(4)


@dataclass(frozen=True)
class Shares:
    """Shares of ln 2, each with its interval; negative where something adds to the crowding of B.

    load: -q / ln 2, B's features say less. persistence: g ln 4 / ln 2, a feature of A is counted by more layers.
    left_layers: r / ln 2. These three sum to 1, by definition.
    geometry: 2 (beta - delta), depth adds less room than width. width: 1 - beta, doubling the width gives less than
    twice the room, which costs B. left_joint: ln R / ln 2 of the joint room's law. These two, load and left_joint sum
    to 1.
    gap: ln R as measured less that of the law, over ln 2: None where it was not measured on the pair.
    """

    load: Estimate
    persistence: Estimate
    left_layers: Estimate
    geometry: Estimate
    width: Estimate
    left_joint: Estimate
    gap: float | None


def shares_of_ln2(*, q: Estimate, g: Estimate, r: Estimate, law: RoomLaw, log_ratio: Estimate | None = None) -> Shares:
    """The shares of `q = ln(load B / load A)`, sharing g, `r = ln 2 + q - g ln 4` and the law of the joint room.

    `log_ratio` is `q + ln(room A / room B)` as measured. That of the law is `q + (2 delta - beta) ln 2`, with q and the
    law taken as independent.
    """
    made = LN2 + q.value - g.value * LN4
    if not math.isclose(r.value, made, abs_tol=1e-6):
        raise ValueError(f"r is {r.value:g}, and ln 2 + q - g ln 4 is {made:g}; take all three of the same trainings")
    room = law.contrast(-1, 2)
    left_joint = linear_combination([(1 / LN2, q), (1.0, room)])
    return Shares(
        load=linear_combination([(-1 / LN2, q)]),
        persistence=linear_combination([(LN4 / LN2, g)]),
        left_layers=linear_combination([(1 / LN2, r)]),
        geometry=law.contrast(2, -2),
        width=linear_combination([(-1.0, law.beta)], constant=1.0),
        left_joint=left_joint,
        gap=None if log_ratio is None else log_ratio.value / LN2 - left_joint.value,
    )
