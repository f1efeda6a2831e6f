"""From a score to a probability: maps fitted on calibration prompts."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from kvguard.predictor import CalibrationMap, Floats

Bools = NDArray[np.bool_]


def fit_calibration_map(
    log_odds: Floats, labels: Bools, method: Literal["isotonic", "platt"]
) -> CalibrationMap:
    """Fit a map from log-odds to probabilities.

    Args:
        log_odds: (n,).
        labels: (n,) both kinds.
        method: ``platt`` (Platt 1999; the slope stays positive) or ``isotonic``.
    """
    if method == "isotonic":
        fit = IsotonicRegression(y_min=1e-4, y_max=1 - 1e-4, out_of_bounds="clip")
        fit.fit(log_odds, labels)
        return CalibrationMap(
            method="isotonic", x=fit.X_thresholds_.tolist(), y=fit.y_thresholds_.tolist()
        )
    positives = int(labels.sum())
    # Platt's own targets: a Laplace-like correction, so that separable scores stay finite
    high, low = (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2)
    wanted = np.where(labels, high, low)

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = point[0] * log_odds + point[1]
        residual = expit(margin) - wanted
        value = np.mean(np.logaddexp(0, margin) - wanted * margin)
        return float(value), np.array([np.mean(residual * log_odds), np.mean(residual)])

    found = optimize.minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.05, 20.0), (-50.0, 50.0)],
    )
    return CalibrationMap(method="platt", slope=float(found.x[0]), intercept=float(found.x[1]))
