"""Thresholds with a certificate: Learn-then-Test over the controller's grid."""

from pathlib import Path
from typing import NamedTuple

import polars as pl

from kvguard import config
from kvguard.train import Predictor, Table


class Certificate:
    """What is guaranteed, in numbers and words; see `load_certificate`."""


class Calibration(NamedTuple):
    """The certificate and its tables."""

    certificate: Certificate
    tables: dict[str, pl.DataFrame]  # certificate, certificate_grid, leakage_check_calibration


def calibrate(
    predictor: Predictor,
    predictions: Table,
    labels: Table,
    splits: Table,
    controller: config.Controller,
    certificate: config.Certificate,
) -> Calibration:
    """Choose the operating points on calibration prompts and certify them."""
    raise NotImplementedError


def save_certificate(certificate: Certificate, path: str | Path) -> None:
    """Write the certificate as JSON."""
    raise NotImplementedError


def load_certificate(path: str | Path) -> Certificate:
    """Read a certificate; `.operating_point(name)` gives a `controller.ControllerConfig`."""
    raise NotImplementedError
