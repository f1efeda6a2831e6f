"""What a predictor's file says of its origin."""

import hashlib
from importlib import metadata
from typing import Any

import numpy as np

from kvguard import schema
from kvguard.config import digest
from kvguard.row_batches import BLOCK_ROWS
from kvguard.rows import Rows, outcome


def provenance(rows: Rows, target: str, seed: int) -> dict[str, Any]:
    """Seed, counts and digests of what a predictor is fitted on; conditions; library versions."""
    labels = outcome(rows, target)
    content = hashlib.sha256()
    for start in range(0, len(rows.features), BLOCK_ROWS):
        content.update(rows.features[start : start + BLOCK_ROWS].tobytes())
    content.update(labels.tobytes())
    prompts = rows.keys["prompt_id"].unique().sort().to_list()
    content.update("".join(prompts).encode())
    return {
        "seed": seed,
        "data_digest": content.hexdigest()[:16],
        "train_prompts": len(prompts),
        "train_prompts_digest": digest(prompts),
        "train_rows": len(labels),
        "positive_rows": int(labels.sum()),
        "harmed_prompts": rows.keys.filter(labels)["prompt_id"].n_unique(),
        "conditions": _conditions(rows),
        "versions": {
            name: metadata.version(name) for name in ("xgboost", "scikit-learn", "numpy", "polars")
        },
    }


def _conditions(rows: Rows) -> dict[str, Any]:
    """What the rows come from: (press, ratio) pairs, and token budgets."""
    pairs = rows.keys.select("press", "ratio").unique().sort("press", "ratio").rows()
    relative = rows.features[:, schema.FEATURE_NAMES.index("relative_position")]
    started = relative > 0
    budgets = np.round(rows.keys["position"].to_numpy()[started] / relative[started].astype(float))
    return {
        "presses": [list(pair) for pair in pairs],
        "max_new_tokens": sorted({int(budget) for budget in budgets}),
    }
