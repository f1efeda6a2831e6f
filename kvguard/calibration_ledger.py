"""How many certificates used the same calibration prompts, and whether the plan preceded them.

The ledger is a file of JSON lines beside the results that no rule deletes. `record_plan` writes the
digest of everything that a certificate depends on but the prompts (sections of the configuration,
seed, code of training and calibration) when a run starts, before any prompt is generated. The
predictor is a function of that plan and of train prompts, so freezing the plan freezes it.
`record_certificate` writes every certificate with the prompts behind it, and says how many there
have been: each was tested with error delta, so with probability 1 - n x delta all n hold.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvguard.calibration import PriorUse

LEDGER = "calibration_ledger.jsonl"
"""Name of the ledger in the results folder."""


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The entries so far, oldest first; none where there is no file.

    Raises:
        ValueError: a line cannot be read; names it.
    """
    path = Path(path)
    entries = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, is damaged ({error}); remove the line: a certificate that "
                f"it noted is no longer counted"
            ) from None
    return entries


def record_plan(path: str | Path, plan: str, prompts_exist: bool) -> None:
    """Note a plan, once for each digest.

    Args:
        path: of the ledger.
        plan: digest of the plan.
        prompts_exist: whether any prompt of the run has been generated from already.
    """
    if not any(entry["event"] == "plan" and entry["plan"] == plan for entry in read_ledger(path)):
        _append(path, {"event": "plan", "plan": plan, "prompts_exist": prompts_exist})


def record_certificate(
    path: str | Path, plan: str, predictor: str, prompts: Sequence[str]
) -> PriorUse:
    """Note a certificate and say what the ledger knows of its prompts.

    The same plan and predictor on the same prompts is the same certificate and is counted once.

    Args:
        path: of the ledger.
        plan: digest of the plan.
        predictor: digest of the predictor.
        prompts: ids of the prompts that certify.
    """
    entries = read_ledger(path)
    made = {"event": "certificate", "plan": plan, "predictor": predictor}
    mine = set(prompts)
    used = {
        (entry["plan"], entry["predictor"])
        for entry in entries
        if entry["event"] == "certificate" and mine & set(entry["prompts"])
    }
    if (plan, predictor) not in used:
        _append(path, made | {"prompts": sorted(mine)})
    frozen = [entry for entry in entries if entry["event"] == "plan" and entry["plan"] == plan]
    return PriorUse(
        frozen=plan,
        certificates=len(used | {(plan, predictor)}),
        frozen_before_prompts=bool(frozen) and not frozen[0]["prompts_exist"],
    )


def _append(path: str | Path, entry: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    stamped = entry | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    with Path(path).open("a") as file:
        file.write(json.dumps(stamped) + "\n")
