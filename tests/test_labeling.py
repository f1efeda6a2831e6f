import polars as pl
import pytest
from polars.testing import assert_frame_equal
from synthetic import make_run, write_run

from kvguard import schema
from kvguard.config import Labels
from kvguard.labeling import build_labels, label_tokens

KEYS = {"model": "m", "press": "snapkv", "ratio": "0.500", "prompt_id": "p"}


def one_trace(length: int, **found: object) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Token keys of one trace, and its outcome: harmless but for ``found``."""
    harmless = dict.fromkeys(
        ("looping", "non_termination", "amnesia", "divergence", "catastrophe"), False
    )
    outcome = pl.DataFrame([KEYS | harmless | found], schema=schema.OUTCOMES)
    rows = [KEYS | {"position": position} for position in range(length)]
    tokens = pl.DataFrame(rows, schema={key: schema.TOKENS[key] for key in schema.TOKEN_KEYS})
    return tokens, outcome


def test_a_hazard_is_the_stretch_of_tokens_up_to_and_with_the_onset():
    tokens, outcome = one_trace(7, looping=True, looping_onset=4, catastrophe=True, onset=4)
    labelled = label_tokens(tokens, outcome, Labels(horizon_tokens=3))
    for target in ("looping", "any"):
        assert labelled[f"steps_to_{target}"].to_list() == [4, 3, 2, 1, 0, -1, -2]
        hazard = [False, False, True, True, True, False, False]
        assert labelled[f"hazard_{target}"].to_list() == hazard
        post = [False, False, False, False, True, True, True]
        assert labelled[f"post_onset_{target}"].to_list() == post
    assert labelled["steps_to_amnesia"].null_count() == 7
    assert not labelled["hazard_amnesia"].any()
    assert not labelled["post_onset_amnesia"].any()


def test_what_was_never_judged_is_unknown_and_not_false():
    tokens, outcome = one_trace(3, amnesia=None, divergence=None)
    labelled = label_tokens(tokens, outcome, Labels())
    for target, unknown in (("amnesia", 3), ("divergence", 3), ("looping", 0), ("any", 0)):
        assert labelled[f"hazard_{target}"].null_count() == unknown
        assert labelled[f"post_onset_{target}"].null_count() == unknown


def test_only_what_was_right_uncompressed_teaches_harm():
    """A right twin and a found onset count, a wrong twin and an onset nobody found do not."""
    pairs = [
        # uncompressed right, harmed, onset -> hazard of tokens 0, 1, 2 with a horizon of 2
        (True, True, 2, [False, True, True]),
        (True, False, None, [False, False, False]),
        (False, False, None, [None, None, None]),
        (True, True, None, [None, None, None]),
    ]
    for before, harmed, onset, hazard in pairs:
        tokens, outcome = one_trace(
            3, right=before and not harmed, baseline_right=before, harmed=harmed, harm_onset=onset
        )
        twin = {"press": "none", "ratio": "0.000", "right": before, "catastrophe": False}
        twin_row = pl.DataFrame([KEYS | twin], schema=schema.OUTCOMES)
        labelled = label_tokens(tokens, pl.concat([outcome, twin_row]), Labels(horizon_tokens=2))
        assert labelled["hazard_harm"].to_list() == hazard
        after = [None if onset is None else position >= onset for position in range(3)]
        wanted = after if harmed and onset is not None else hazard
        assert labelled["post_onset_harm"].to_list() == wanted


@pytest.mark.parametrize("horizon", [1, 32])
def test_labels_of_a_run_equal_the_definition_row_by_row(horizon):
    run = make_run(12, seed=4)
    labelled = label_tokens(run.tokens, run.outcomes, Labels(horizon_tokens=horizon))
    assert labelled.select(schema.TOKEN_KEYS).equals(run.tokens.select(schema.TOKEN_KEYS))
    by_key = {tuple(row[key] for key in schema.TRACE_KEYS): row for row in run.outcomes.to_dicts()}
    for row in labelled.sample(400, seed=0).iter_rows(named=True):
        outcome = by_key[tuple(row[key] for key in schema.TRACE_KEYS)]
        onsets = {target: outcome[f"{target}_onset"] for target in schema.TARGETS[2:]}
        catastrophes = [onsets[kind] for kind in ("looping", "non_termination", "amnesia")]
        onsets["any"] = min((o for o in catastrophes if o is not None), default=None)
        for target, onset in onsets.items():
            steps = None if onset is None else onset - row["position"]
            assert row[f"steps_to_{target}"] == steps
            assert row[f"hazard_{target}"] is (steps is not None and 0 <= steps < horizon)
            assert row[f"post_onset_{target}"] is (steps is not None and steps <= 0)


def test_files_give_the_same_labels_as_a_table(tmp_path):
    run = make_run(12, seed=4)
    files = write_run(run, tmp_path)
    build_labels(files.tokens, run.outcomes, Labels(), tmp_path / "labels.parquet")
    labelled = schema.read_table(tmp_path / "labels.parquet", schema.LABELS)
    assert_frame_equal(labelled, label_tokens(run.tokens, run.outcomes, Labels()))


def test_tokens_without_an_outcome_are_refused_before_anything_is_written(tmp_path):
    run = make_run(6, error_rate=0)
    files = write_run(run, tmp_path)
    missing = run.outcomes.row(0, named=True)["prompt_id"]
    with pytest.raises(ValueError, match=missing):
        label_tokens(run.tokens, run.outcomes[1:], Labels())
    with pytest.raises(ValueError, match=missing):
        build_labels(files.tokens, run.outcomes[1:], Labels(), tmp_path / "labels.parquet")
    assert not (tmp_path / "labels.parquet").exists()
