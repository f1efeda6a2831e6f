"""What a policy of the live experiment needs beyond the model, from the files of its job."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from kvguard.certificate import load_certificate
from kvguard.harm_model import load_harm_model
from kvguard.live import match_guard
from kvguard.predictor import load_predictor
from kvguard.rival_settings import load_gate, load_rivals
from kvguard.schema import RUNS, read_table


def policy_needs(
    inputs: Mapping[str, Any],
    policy: str,
    operating_point: str,
    *,
    model: str,
    press: str,
    ratio: str,
) -> dict[str, Any]:
    """Arguments of `live.run_policy_shard`: a guard's predictor, a matched rival's match.

    Args:
        inputs: files of the job by the rule's names; those that the policy does not need lack.
        policy: one of config.POLICY_NAMES.
        operating_point: of the guard.
        model, press, ratio: the condition.
    """
    needs: dict[str, Any] = {}
    if "predictor" in inputs:
        certificate = load_certificate(inputs["certificate"])
        needs["predictor"] = load_predictor(inputs["predictor"])
        needs["controller"] = certificate.operating_point(operating_point)
    if "simulation" in inputs:
        matched = [inputs["simulation"], *inputs.get("guard_runs", [])]
        runs = pl.concat(read_table(path, RUNS) for path in matched)
        needs |= match_guard(runs, policy, model=model, press=press, ratio=ratio)
    if "rivals" in inputs:
        fitted = load_rivals(inputs["rivals"])[model, press, ratio]
        needs |= fitted.model_dump(include={"clock_tokens", "gate_threshold", "ladder_threshold"})
    if "harm_model" in inputs:
        needs["harm_model"] = load_harm_model(inputs["harm_model"])
    if "baselines" in inputs:
        needs["gate"] = load_gate(inputs["baselines"])
    return needs
