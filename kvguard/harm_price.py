"""The guard with one price: check what is worth it, `guard_price`.

The user says what a harmed answer costs, in drafted tokens: ``harm_price``. Everything else follows
from that and from what a check costs. A check repairs the draft since the last clean check exactly,
so it is worth

    harm_price x P  >  c + W,

with P the probability that the draft holds harm (`harm_model`), c what the check costs in drafted
tokens (`checks.check_prices`: the row's share of the pass and its own cache, bus included), and W
the tokens behind the first rejection, which are drafted again: with S_i the survival of the
draft's first i tokens (`check_timing`) the sum of 1 - S_i over all i but the last, since the check
gives the token at the rejection itself.

**At the end** a request is checked if that is worth it. Price 0 is compression alone, and with an
infinite price every answer is the uncompressed one.

**While drafting** a check that will be made wastes what is drafted behind the first rejection,
harmful or not; an answer that will not be checked wastes nothing. So a check comes early where it
is worth it already *and* going on costs more than it keeps: S under the stopping threshold of
`check_timing`. P and W grow with the draft and P levels off first, so a draft that is worth a check
and goes on is one whose survival is high: it is checked at its end, or later for less.

**Sharing**: a row joins a pass that happens anyway where the check is worth it without its share of
the pass, and the row has ended or would join under `lossless_auto`.

**Promotion**: as in `check_timing`, but going on compressed costs what checks cost or what the harm
of as many unchecked tokens is expected to, whichever is less: a row whose tokens need no check is
not promoted for what its earlier checks have cost.

**Modes**: ALERT while a check is worth it (the stream is held back), SAFE while that is so and the
row's checks have found more rejections than expected, and once it is promoted, NORMAL otherwise. A
rejection raises the row's factor, so P and 1 - S grow faster and checks come sooner by themselves,
until clean checks bring the factor down again.

The rule looks no further than the draft. It is compared with the best rule, found by dynamic
programming, in tests/test_harm_price.py.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard.check_timing import FloatArray, LosslessAuto
from kvguard.controller import Mode
from kvguard.harm_model import DEFAULT, HarmModel
from kvguard.policies import Action, Decision, Observation

BoolArray = NDArray[np.bool_]


class GuardPrice(LosslessAuto):
    """Check where harm that is expected costs more than the check; go on compressed.

    Args:
        name: of the policy.
        rows: slots.
        harm_price: what a harmed answer costs in drafted tokens; at least 0, infinite is lossless.
        max_new_tokens: longest answer, one for all rows or of each.
        model: of P.

    Raises:
        ValueError: ``harm_price`` is negative or no number.
    """

    checks_everything = False

    def __init__(
        self,
        name: str,
        rows: int,
        harm_price: float,
        max_new_tokens: ArrayLike,
        model: HarmModel | None = None,
    ) -> None:
        if not harm_price >= 0:
            raise ValueError(f"harm_price is at least 0, in drafted tokens, got {harm_price!r}")
        super().__init__(name, rows, int(np.max(max_new_tokens, initial=1)))
        self.harm_price, self.model = float(harm_price), model or DEFAULT
        self.checks_everything = math.isinf(self.harm_price)
        self.behind = np.zeros(rows)  # sum of 1 - S over the draft's tokens
        self.score = np.full(rows, np.nan)  # the gate's, at prefill
        self.ended = np.zeros(rows, np.bool_)
        self.rejected = np.zeros(rows, np.bool_)  # a check found more than was expected of the row
        self.row_state += [self.behind, self.score, self.ended, self.rejected]

    def reset(self, row: int, seed: int) -> None:
        """Nothing of the new request has been drafted, nothing is known of it."""
        super().reset(row, seed)
        self.behind[row], self.score[row] = 0.0, np.nan
        self.ended[row] = self.rejected[row] = False

    def checked(self, row: int, kept: int) -> None:
        """Learn from a check, and whether the row is disturbed more than was expected."""
        accepted = kept - int(self.start[row])
        rejected = 0 < accepted < int(self.drafted[row])
        super().checked(row, kept)
        disturbed = self.rejections[row] > self.expected[row]
        self.rejected[row] = (self.rejected[row] or rejected) and disturbed

    def _begin(self, rows: NDArray[np.intp], tokens: NDArray[np.int64]) -> None:
        super()._begin(rows, tokens)
        self.behind[rows], self.ended[rows] = 0.0, False

    def step(self, observation: Observation) -> Decision:
        """Check where that is worth it already and drafting on is not."""
        rows = observation.rows
        self._advance(observation)
        self.behind[rows] += 1 - self._survival(rows)
        if observation.probe is not None:
            self.score[rows] = observation.probe
        worth = self.worth(rows) & ~self.promoted[rows]
        due = worth & self._stops(rows)
        self.asked[rows] = due
        checked = np.where(self.rejected[rows], Mode.SAFE, Mode.ALERT)
        calm = np.where(self.promoted[rows], Mode.SAFE, Mode.NORMAL)
        self.modes[rows] = np.where(worth, checked, calm)
        return self._decide(observation, Action.CHECK, due)

    def finish(self, observation: Observation) -> Decision:
        """Check what is unchecked where that is worth it."""
        rows = observation.rows
        due = (self.drafted[rows] > 0) & self.worth(rows) & ~self.promoted[rows]
        self.asked[rows], self.ended[rows] = due, True
        return self._decide(observation, Action.CHECK, due)

    def harm(self, rows: NDArray[np.intp]) -> FloatArray:
        """(n,) probability that the draft holds harm."""
        factor = self.rejections[rows] / self.expected[rows]
        return self.model.predict(self._rejections(rows) * factor, self.score[rows])

    def _spared(self, row: int, ahead: int) -> float:
        """As there, or the harm that is expected of as many tokens if nobody checks them."""
        index = np.array([row])
        _, rate, _ = self._outlook(index)
        harm = float(self.model.predict(rate * ahead, self.score[index])[0])
        unchecked = self.harm_price * harm if harm > 0 else 0.0
        return min(super()._spared(row, ahead), unchecked)

    def redone(self, rows: NDArray[np.intp]) -> FloatArray:
        """(n,) tokens of the draft that a check now is expected to have drafted again."""
        return np.asarray(self.behind[rows] - (1 - self._survival(rows)))

    def worth(self, rows: NDArray[np.intp], *, shares: bool = True) -> BoolArray:
        """(n,) where a check now costs less than the harm that it is expected to repair.

        Args:
            rows: (n,).
            shares: the row pays its share of the pass; False: the pass happens anyway.
        """
        cost = self._price(rows) if shares else self.own_tokens[rows]
        return np.asarray(self.harm_price * self.harm(rows) > cost + self.redone(rows))

    def _joins(self, rows: NDArray[np.intp]) -> BoolArray:
        return self.worth(rows, shares=False) & (self.ended[rows] | super()._joins(rows))
