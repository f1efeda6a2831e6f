"""When a draft is worth a check: the horizon of `lossless_auto`.

A check may come after any token; what is kept is the uncompressed answer either way. So the moment
is a question of cost alone, and an optimal-stopping problem with a closed answer.

**Survival.** S is the probability that the uncompressed model would have chosen every token of the
draft so far. A token with top-1 probability p is rejected at the rate ``rejection_rate(p)``, times
a factor of the row: how much the press disturbs this prompt. The factor has a Gamma prior of mean 1
and mass `PRIOR_REJECTIONS`; the row's checks update it (rejections seen over rejections expected),
and S is its posterior mean of exp(-factor x rates): (e / (e + R)) ** a, with a the rejections, e
the expected ones and R the draft's own rates, all with the prior.

**Check when due.** One more token costs 1 (costs are in drafted tokens) and is kept with the
probability S. With theta the kept tokens that a drafted token's cost buys in the long run, going on
pays while S > theta. S falls with every token, so looking one token ahead is optimal (the monotone
case of Chow and Robbins; SpecDec++, arXiv 2405.19715, derives the threshold on S and trains a head
for it; VeriCache, arXiv 2605.17613, checks after a fixed number). A cycle of n tokens at the
constant rate h, where a check costs k and gives a token itself, keeps 1 + (1 - S) / h for n + k:
the theta at which it is best to stop fulfils, with x = 1 / theta,

    h (k - x) = x - 1 - ln x.

**Join when a check happens anyway.** A pass over several rows costs a shared part (the weights and
a prefix that the prompts share are read once) and each row's own (the rest of its cold cache). A
row that would be due later spares its share of another pass by joining now, and loses what the
tokens until then would have brought: at the constant rate h that is (y - 1 - ln y) / h in drafted
tokens, with y = S / theta. So it joins where y - 1 - ln y < h x share. The two thresholds are the
can-order policy of joint replenishment.

**A row that is checked in vain is promoted.** Where drafts are rejected every few tokens, no moment
is a good one: every check moves the whole parked cache. After each check a row is asked whether its
full cache should come back to the device, where it is exact and never checked again. That costs the
transfer once and, with every further token, e drafted tokens for the memory that it takes from the
other rows and for reading it (`checks.check_prices`). It is a ski rental with two rates: going
on costs g a kept token, promoted the token costs 1 + e and the change the transfer. With

    g = (n / theta + paid) / (n + kept),    n = `PRIOR_KEPT`,

what the row's kept tokens have cost so far (checks, tokens drafted, wasted ones among them), drawn
towards the model's expectation 1 / theta by n tokens, the row is promoted where

    min(kept, left) x (g - 1 - e) > transfer,

kept being the tokens that stay and left those that the limit still allows. *Looking ahead*: as many
tokens as there have been are expected to come, what an answer of unknown scale is expected to do
(Lindy's law), and never more than are left; so checks that cost less than the memory promote
nobody. *Looking back*: kept x (g - 1 - e) is, but for the prior, what the checks have cost beyond
the promoted row's price for the same tokens. It is promoted as soon as that regret reaches the
transfer: the deterministic rule of ski rental, at most twice the best choice in hindsight, and a
check, where the rate is steady and but for the prior (Karlin, Manasse, Rudolph and Sleator,
Competitive snoopy caching, 1988, for one rate; Lotker, Patt-Shamir and Rawitz, Rent, lease, or buy,
2012, for two). If it would have had to be promoted later than half way to the limit, it never is:
then the regret of the whole answer is below 2 transfers, too. Whatever the drafts do, a row that
goes on with kept <= left has at most the regret

    transfer x (1 + n / kept) + n x e,

so one hopeless row has a bound where everything is checked (tests/test_promotion.py). There is no
way back: a row whose drafts would have become clean pays e for each token that is left.

**Prices** follow from sizes (`check_prices`): no clock is read, so a run can be repeated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvguard.controller import Mode
from kvguard.policies import Action, Decision, Observation
from kvguard.rivals import Lossless
from kvguard.schema import SIGNALS

TOP1 = list(SIGNALS).index("top1_probability")

RATE_FACTOR, RATE_POWER, RATE_FLOOR = 0.7, 1.2, 0.001
"""Of `rejection_rate`; docs/decisions.jsonl says what they were fitted to."""

PRIOR_REJECTIONS = 2.0
"""Mass of the prior of a row's factor, in expected rejections."""

PRIOR_TOKENS = 32
"""Tokens whose mean rate is taken as `RATE_MEAN` before a row has shown its own."""

RATE_MEAN = 0.06
"""Rejections a drafted token, before a row has shown its own."""

LONGEST_TOKENS = 64
"""A row is checked after so many tokens, whatever its survival."""

MEMORY_PASSES = 4
"""Passes over which the number of rows that share one is averaged."""

PRIOR_KEPT = 4
"""Kept tokens at the expected cost that a row's own costs are drawn towards."""

SHARED_TOKENS, OWN_TOKENS = 3.0, 1.0
"""What a check costs in drafted tokens until `LosslessAuto.set_prices` says otherwise."""

FloatArray = NDArray[np.float64]


def rejection_rate(top1: NDArray[np.floating]) -> FloatArray:
    """Rejections expected of drafted tokens, any shape, from their top-1 probability."""
    unsure = np.clip(1 - np.nan_to_num(top1.astype(np.float64), nan=0.0), 0, 1)
    return np.asarray(RATE_FACTOR * unsure**RATE_POWER + RATE_FLOOR)


def stopping_survival(rate: ArrayLike, price: ArrayLike) -> FloatArray:
    """The survival below which a draft is due, theta of the module's equation.

    Args:
        rate: rejections a token, > 0.
        price: of a check, in drafted tokens; at most 1: theta is 1, checking beats drafting.

    >>> stopping_survival([0.01, 0.1], 4.0).round(2)
    array([0.8 , 0.55])
    """
    rates, prices = np.broadcast_arrays(
        np.asarray(rate, np.float64), np.maximum(np.asarray(price, np.float64), 1.0)
    )
    x = prices.copy()
    for _ in range(8):  # Newton's method, from the right on a convex function: it never overshoots
        excess = x - 1 - np.log(x) - rates * (prices - x)
        x = np.maximum(x - excess / (1 - 1 / x + rates), 1.0)
    return np.asarray(1 / x)


class Promotion(NamedTuple):
    """What it costs to bring rows' full caches back, in drafted tokens; all (rows,).

    Attributes:
        transfer: once.
        extra: with every further token, beyond the token itself.
        limit: the longest answer, in tokens.
    """

    transfer: FloatArray
    extra: FloatArray
    limit: NDArray[np.int64]


class Prices(NamedTuple):
    """What checks cost, in drafted tokens.

    Attributes:
        shared: of a pass, however many rows it is for.
        own: (rows,) of each row in it.
        promotion: the way out; None: there is none.
    """

    shared: float
    own: FloatArray
    promotion: Promotion | None = None


class LosslessAuto(Lossless):
    """Check when the draft is no longer worth going on with, and at the end; go on compressed.

    Every answer is the uncompressed one, as with `Lossless`; the module says when checks come.

    Args:
        name: of the policy.
        rows: slots.
        longest_tokens: a draft is checked after so many tokens at the latest.
    """

    def __init__(self, name: str, rows: int, longest_tokens: int = LONGEST_TOKENS) -> None:
        super().__init__(name, rows, longest_tokens)
        self.shared_tokens = SHARED_TOKENS
        self.rows_a_pass = 1.0  # running mean
        self._priced = False
        self.own_tokens = np.full(rows, OWN_TOKENS)
        self.drafted = np.zeros(rows, np.int64)  # tokens of the draft at work
        self.rates = np.zeros((rows, longest_tokens))  # cumulative, of the draft's tokens
        self.asked = np.zeros(rows, np.bool_)  # a check of the draft was decided on
        self.rejections = np.full(rows, PRIOR_REJECTIONS)
        self.expected = np.full(rows, PRIOR_REJECTIONS)
        self.judged = np.zeros(rows, np.int64)  # tokens that checks have looked at
        self.transfer = np.full(rows, np.inf)  # of `Promotion`, as the next two
        self.extra = np.zeros(rows)
        self.limit = np.zeros(rows, np.int64)
        self.paid = np.zeros(rows)  # for checks and for the tokens that they judged
        self.promoted = np.zeros(rows, np.bool_)
        self.row_state += [
            self.transfer,
            self.extra,
            self.limit,
            self.paid,
            self.promoted,
            self.own_tokens,
            self.drafted,
            self.rates,
            self.asked,
            self.rejections,
            self.expected,
            self.judged,
        ]

    def reset(self, row: int, seed: int) -> None:
        """Nothing of the new request has been drafted; its factor is the prior's."""
        super().reset(row, seed)
        self.drafted[row] = self.judged[row] = 0
        self.asked[row] = False
        self.own_tokens[row] = OWN_TOKENS
        self.rejections[row] = self.expected[row] = PRIOR_REJECTIONS
        self.transfer[row], self.paid[row], self.promoted[row] = np.inf, 0.0, False

    def set_prices(self, prices: Prices) -> None:
        """What checks of the first ``len(prices.own)`` rows cost from now on."""
        self.shared_tokens = prices.shared
        most = float(len(prices.own))
        self.rows_a_pass = min(self.rows_a_pass, most) if self._priced else most
        self._priced = True
        self.own_tokens[: len(prices.own)] = prices.own
        if prices.promotion is not None:
            for mine, new in zip(
                (self.transfer, self.extra, self.limit), prices.promotion, strict=True
            ):
                mine[: len(new)] = new

    def due(
        self, rows: NDArray[np.intp], tokens: NDArray[np.int64], every: int
    ) -> NDArray[np.int64]:
        """At every token."""
        return tokens + 1

    def checked(self, row: int, kept: int) -> None:
        """Learn from a check: the row's first ``kept`` tokens stay, the next draft begins there."""
        start, drafted = int(self.start[row]), int(self.drafted[row])
        accepted = kept - start
        if drafted > 0:
            self.paid[row] += drafted + float(self._price(np.array([row]))[0])
        if drafted > 0 and accepted > 0:  # the first is never rejected: nothing was evicted there
            seen = min(accepted + 1, drafted)
            self.rejections[row] += accepted < drafted
            self.expected[row] += self.rates[row, min(seen, self.rates.shape[1]) - 1]
            self.judged[row] += seen - 1
        self._begin(np.array([row]), np.array([kept]))

    def promotes(self, row: int) -> bool:
        """Whether the full cache should come back, so that the row needs no further check."""
        kept = int(self.start[row])
        ahead = min(kept, int(self.limit[row]) - kept)
        if ahead <= 0 or not np.isfinite(self.transfer[row]):
            return False
        spared = self._spared(row, ahead) - ahead * float(self.extra[row])
        return bool(spared > self.transfer[row])

    def _spared(self, row: int, ahead: int) -> float:
        """What going on compressed is expected to cost beyond so many tokens themselves."""
        theta = float(self._outlook(np.array([row]))[2][0])
        kept = int(self.start[row])
        each = (PRIOR_KEPT / theta + float(self.paid[row])) / (PRIOR_KEPT + kept)
        return ahead * (each - 1)

    def set_promoted(self, row: int) -> None:
        """The row is exact from here: SAFE, and never checked again."""
        self.promoted[row], self.modes[row] = True, Mode.SAFE

    def _begin(self, rows: NDArray[np.intp], tokens: NDArray[np.int64]) -> None:
        """Rows whose next draft begins behind so many tokens."""
        self.start[rows], self.drafted[rows], self.asked[rows] = tokens, 0, False

    def step(self, observation: Observation) -> Decision:
        """Check where the draft with this token is due."""
        rows = observation.rows
        self._advance(observation)
        due = self._stops(rows) | (self.drafted[rows] >= self.every_tokens)
        due &= ~self.promoted[rows]
        self.asked[rows] = due
        return self._decide(observation, Action.CHECK, due)

    def _advance(self, observation: Observation) -> None:
        """Take each row's next drafted token in."""
        rows, tokens = observation.rows, observation.positions.astype(np.int64) + 1
        stale = self.asked[rows]  # nobody told of the check: its draft counts as done with
        self._begin(rows[stale], self.start[rows[stale]] + self.drafted[rows[stale]])
        self.drafted[rows] = tokens - self.start[rows]
        last = np.minimum(self.drafted[rows], self.rates.shape[1]) - 1
        own = rejection_rate(observation.signals[:, TOP1])
        # The first token comes from the prefill's or the check's logits: nothing was evicted there.
        self.rates[rows, last] = np.where(
            last > 0, self.rates[rows, np.maximum(last - 1, 0)] + own, 0.0
        )

    def _stops(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(n,) where one more token is kept too seldom to be drafted."""
        survival, rate, threshold = self._outlook(rows)
        return np.asarray(survival * np.exp(-rate) < threshold)

    def finish(self, observation: Observation) -> Decision:
        """Check what is unchecked."""
        due = (self.drafted[observation.rows] > 0) & ~self.promoted[observation.rows]
        self.asked[observation.rows] = due
        return self._decide(observation, Action.CHECK, due)

    def share_pass(self, due: int, others: Sequence[int]) -> list[int]:
        """Rows that join a pass which happens anyway.

        Args:
            due: rows that the pass is for.
            others: rows that `step` has just let go on.
        """
        rows = np.array(others, np.intp)
        joining = rows[self._joins(rows) & (self.drafted[rows] > 0) & ~self.promoted[rows]]
        self.asked[joining] = True
        self.rows_a_pass += (due + len(joining) - self.rows_a_pass) / MEMORY_PASSES
        return [int(row) for row in joining]

    def _joins(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(n,) where sharing a pass saves more than drafting on would bring."""
        survival, rate, threshold = self._outlook(rows)
        y = np.maximum(survival / threshold, 1.0)
        saved = rate * self.shared_tokens / self.rows_a_pass
        return np.asarray(y - 1 - np.log(y) < saved)

    def _survival(self, rows: NDArray[np.intp]) -> FloatArray:
        """(n,) probability that a check accepts the whole draft."""
        expected = self.expected[rows]
        return np.asarray((expected / (expected + self._rejections(rows))) ** self.rejections[rows])

    def _rejections(self, rows: NDArray[np.intp]) -> FloatArray:
        """(n,) rejections expected of the draft, before the row's factor."""
        last = np.clip(self.drafted[rows], 1, self.rates.shape[1]) - 1
        return np.asarray(self.rates[rows, last])

    def _price(self, rows: NDArray[np.intp]) -> FloatArray:
        """(n,) what a check costs in drafted tokens, with the row's share of the pass."""
        return np.asarray(self.own_tokens[rows] + self.shared_tokens / self.rows_a_pass)

    def _outlook(self, rows: NDArray[np.intp]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(n,) survival of the drafts, rejections a token to come, survival at which to stop."""
        mass, expected = self.rejections[rows], self.expected[rows]
        seen = self.expected[rows] - PRIOR_REJECTIONS
        mean = (seen + PRIOR_TOKENS * RATE_MEAN) / (self.judged[rows] + PRIOR_TOKENS)
        rate = mean * mass / expected
        return self._survival(rows), rate, stopping_survival(rate, self._price(rows))
