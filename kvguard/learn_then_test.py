"""Learn-then-Test: p-values for risks that are means of losses, and a sequence that controls error.

Angelopoulos, Bates, Candès, Jordan and Lei 2021. Each operating point is a null hypothesis "its
risk exceeds alpha". A p-value that is valid for any distribution is computed from independent
units, and a fixed sequence rejects some of the hypotheses with a family-wise error of at most
delta. `mapie.risk_control.BinaryClassificationController` has the same p-values and sequences, but
a row of its input is an independent unit with a 0/1 loss. Shares per prompt do not fit that, so its
parts are used, not the class.
"""

import numpy as np
from mapie.risk_control.fwer_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_MAX_PROMPTS = 10_000_000


def p_values(means: ArrayLike, units: ArrayLike, alpha: float, *, single: bool = False) -> Floats:
    """Super-uniform p-values for "the expected loss exceeds alpha", losses in [0, 1].

    Args:
        means: (G,) mean losses.
        units: (G,) or one number: independent units in each mean.
        alpha: the level that the risk is tested against.
        single: the losses are 0 or 1 by design; then the exact binomial tail applies.

    Returns:
        (G,) p-values; 1 without units.

    Source: Hoeffding-Bentkus p-value, Bates et al. 2021, through MAPIE.
    """
    mean = np.atleast_1d(np.asarray(means, dtype=np.float64))
    count = np.broadcast_to(np.asarray(units, dtype=np.float64), mean.shape).copy()
    known = (count > 0) & np.isfinite(mean)
    values = np.ones(len(mean))
    if known.any():
        # a hair less, so that count x mean does not round up past a whole number of losses
        lowered = np.maximum(mean[known] - 1e-12, 0.0)
        found = compute_hoeffding_bentkus_p_value(lowered, count[known], alpha, binary=single)
        values[known] = np.minimum(found[:, 0], 1.0)
    return values


def certify(values: ArrayLike, order: ArrayLike, delta: float) -> Bools:
    """Which hypotheses a fixed sequence rejects, with family-wise error of at most ``delta``.

    Args:
        values: (G,) p-values.
        order: (G,) indices in the order of testing, chosen without the data behind ``values``.
        delta: bound on the chance that any true hypothesis is rejected.

    Returns:
        (G,) true where the hypothesis is rejected, that is, the setting certified.

    Source: fixed-sequence testing, Bauer 1991, through MAPIE.
    """
    numbers, sequence = np.asarray(values, dtype=np.float64), np.asarray(order)
    certified = np.zeros(len(numbers), dtype=np.bool_)
    certified[sequence[control_fwer(numbers[sequence], delta, "fixed_sequence")]] = True
    return certified


def prompts_needed(observed: float, alpha: float, delta: float, *, single: bool) -> int | None:
    """Prompts at which a risk under alpha could be certified, were ``observed`` their mean loss.

    Returns:
        The smallest such number; None where the observed loss is not under alpha.
    """
    if observed >= alpha:
        return None
    stop = 64
    while stop <= _MAX_PROMPTS:
        counts = np.arange(1, stop)
        values = p_values(np.full(len(counts), observed), counts, alpha, single=single)
        enough = np.flatnonzero(values <= delta)
        if len(enough):
            return int(counts[enough[0]])
        stop *= 4
    return None


def rate_bounds(mean: float, units: int, delta: float, *, single: bool) -> tuple[float, float]:
    """Lower and upper bound on an expected loss in [0, 1], each with probability 1 - delta.

    The levels that the p-value does not exclude: Clopper and Pearson's interval where losses are 0
    or 1, by bisection.
    """

    def upper(observed: float) -> float:
        low, high = observed, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            excluded = p_values(observed, units, min(middle, 1 - 1e-12), single=single)[0] <= delta
            low, high = (low, middle) if excluded else (middle, high)
        return high

    return 1 - upper(1 - mean), upper(mean)
