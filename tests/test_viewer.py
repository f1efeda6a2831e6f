"""The viewer's page holds every token with its signals, and cannot be broken by their text."""

import json
import re

import polars as pl
import pytest
from synthetic import make_run

from kvguard import schema, viewer
from kvguard.config import OperatingPoint
from kvguard.timeline import build_timeline, choose_example, token_texts

POINT = OperatingPoint(tau_low=0.2, tau_high=0.5, k=2, j=4)


class Spaces:
    """Decodes like SentencePiece: the first token of a text loses its leading space."""

    words = (" the", " apple", "s", "a", "</script>")

    def encode(self, text, *, add_special_tokens):
        return [self.words.index(text)]

    def batch_decode(self, sequences, *, skip_special_tokens):
        return ["".join(self.words[t] for t in ids).removeprefix(" ") for ids in sequences]


@pytest.fixture(scope="module")
def run():
    return make_run(num_prompts=8, max_new_tokens=64, seed=1)


@pytest.fixture(scope="module")
def texts(run):
    ids = sorted(set(run.tokens["token_id"]))
    words = ["</script><b>", " w\n", "é", "\u2028", " $5"]
    return pl.DataFrame(
        {"token_id": ids, "token_text": [words[n % 5] + str(n) for n in range(len(ids))]},
        schema={"token_id": pl.Int32, "token_text": pl.String},
    )


@pytest.fixture(scope="module")
def predictions(run):
    """Hazard 0.9 from token 10 on in compressed runs, 0.1 before; none for the baseline."""
    hazard = pl.when(pl.col("position") >= 10).then(0.9).otherwise(0.1).cast(pl.Float32)
    return run.tokens.filter(pl.col("press") != "none").select(
        *schema.TOKEN_KEYS, split=pl.lit("test"), target=pl.lit("any"), hazard=hazard
    )


@pytest.fixture(scope="module")
def timeline(run, texts, predictions):
    return build_timeline(
        run.tokens.sample(fraction=1, shuffle=True, seed=0), texts, predictions, POINT
    )


def page_data(html):
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    return json.loads(text[1])


def test_token_texts_keep_the_space_that_decoding_alone_would_lose():
    table = token_texts(Spaces(), [1, 0, 1, 2, 4])
    assert table.rows() == [(0, " the"), (1, " apple"), (2, "s"), (4, "</script>")]


def test_modes_follow_the_controller_and_are_unknown_without_a_prediction(timeline):
    assert timeline.filter(pl.col("press") == "none")["mode"].is_null().all()
    # above tau_low from token 10: ALERT after tokens 10 and 11, SAFE after 12 and 13
    expected = [0] * 11 + [1] * 2 + [2]
    for _, trace in timeline.filter(pl.col("press") != "none").group_by(schema.TRACE_KEYS):
        modes = trace.sort("position")["mode"].to_list()
        assert modes == (expected + [2] * len(modes))[: len(modes)]


def test_timeline_refuses_a_token_without_text(run, texts, predictions):
    missing = texts["token_id"][3]
    with pytest.raises(ValueError, match=str(missing)):
        build_timeline(run.tokens, texts.filter(pl.col("token_id") != missing), predictions, POINT)


def test_page_holds_every_token_and_survives_hostile_text(run, timeline, texts):
    html = viewer.render_viewer(
        timeline, run.traces, run.outcomes, run.prompts, controller=POINT, title="</script> title"
    )
    assert html.count("</script>") == 2  # the data element's own and the code's own
    assert "http" not in html
    data = page_data(html)
    assert data["title"] == "</script> title"
    assert len(data["requests"]) == run.traces.height
    text_of = dict(texts.iter_rows())
    for request in data["requests"]:
        keys = [pl.col(key) == request[key] for key in schema.TRACE_KEYS]
        rows = run.tokens.filter(keys).sort("position")
        if request["status"] == "error":
            assert request["tokens"] is None
            assert request["error"]
            continue
        shown = [data["texts"][at] for at in request["tokens"]]
        assert shown == [text_of[token] for token in rows["token_id"]]
        assert request["llr"] == pytest.approx(rows["llr"].to_list(), abs=6e-4)
        assert request["rejected"] == [int(not same) for same in rows["audit_is_argmax"]]
        outcome = run.outcomes.filter(keys).row(0, named=True)
        assert request["looping_onset"] == outcome["looping_onset"]
        assert request["first_rejected"] == outcome["first_rejected"]


def test_a_large_run_is_cut_by_whole_prompts_and_says_so(run, timeline):
    html = viewer.render_viewer(
        timeline,
        run.traces,
        run.outcomes,
        run.prompts,
        controller=POINT,
        title="t",
        max_requests=10,
    )
    data = page_data(html)
    assert (data["prompts_shown"], data["prompts"]) == (3, 8)  # 3 conditions a prompt
    first = run.prompts.sort("index")["prompt_id"].to_list()[:3]
    assert sorted({request["prompt_id"] for request in data["requests"]}) == sorted(first)
    assert len(data["requests"]) == 9
    with pytest.raises(ValueError, match="max_requests"):
        viewer.render_viewer(
            timeline,
            run.traces,
            run.outcomes,
            run.prompts,
            controller=POINT,
            title="t",
            max_requests=0,
        )


def test_missing_numbers_become_null(run, timeline):
    unknown = timeline.with_columns(
        llr=pl.lit(float("nan"), pl.Float32), hazard=pl.lit(None, pl.Float32)
    )
    html = viewer.render_viewer(
        unknown, run.traces, run.outcomes, run.prompts, controller=POINT, title="t"
    )
    request = next(r for r in page_data(html)["requests"] if r["status"] == "ok")
    assert set(request["llr"]) == {None}
    assert set(request["hazard"]) == {None}


def test_the_example_is_a_warned_catastrophe(run, timeline):
    keys = choose_example(timeline, run.outcomes)
    outcome = run.outcomes.filter([pl.col(k) == v for k, v in keys.items()]).row(0, named=True)
    assert outcome["press"] != "none"
    assert outcome["catastrophe"]
    assert outcome["onset"] > 13  # SAFE is reached at token 13 everywhere
    without = run.outcomes.filter(~pl.col("catastrophe").fill_null(True))
    quiet = choose_example(timeline, without)
    chosen = without.filter([pl.col(k) == v for k, v in quiet.items()])
    assert chosen["max_windowed_llr"][0] == (
        without.filter(pl.col("press") != "none")["max_windowed_llr"].max()
    )
    with pytest.raises(ValueError, match="compressed"):
        choose_example(timeline.filter(pl.col("press") == "none"), run.outcomes)
