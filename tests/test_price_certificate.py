"""The certificate over prices of harm: its tests, its words, and what a guard makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvguard import schema
from kvguard.calibration import PriorUse
from kvguard.certificate import CertificateError
from kvguard.certified_use import certified_price
from kvguard.config import ConfigError, load_config
from kvguard.findings_price import price_section, price_sections
from kvguard.guard import KVGuard
from kvguard.guard_predictor import check_streaming
from kvguard.guard_report import GuardError
from kvguard.harm_model import DEFAULT, HarmModel, save_harm_model
from kvguard.integrity import CHECKS
from kvguard.leakage import LeakageError
from kvguard.models import RECORD
from kvguard.policy_factory import make_policy
from kvguard.price_calibration import (
    Losses,
    PriceCalibration,
    certified_prices,
    certify_prices,
    price_losses,
    rows_together,
)
from kvguard.price_certificate import (
    PriceCertificate,
    PriceUse,
    at_certified_price,
    load_price_certificate,
    save_price_certificate,
)
from kvguard.requests import Request
from kvguard.sampling import Decoding
from kvguard.splits import calibration_parts
from kvguard.workflow import price_uses

PRICES, LEVELS, DELTA = (1000.0, 300.0, 100.0), (0.1, 0.05), 0.05
DIGEST = "0123456789abcdef"


def use(ratio: str = "0.500", **fields: Any) -> PriceUse:
    known: dict[str, Any] = {
        "model": "tiny",
        "model_digest": DIGEST,
        "press": "snapkv",
        "press_class": "SnapKVPress",
        "phase": "prefill",
        "press_settings": {"kwargs": {"window_size": 4}},
        "ratio": ratio,
        "tasks": {"recall": 12, "copy": 16},
        "decoding": "greedy",
        "bus_ratio": 50.0,
        "margin_nats": 1e-4,
        "cold": "host",
        "safe_ratio": 0.0,
        "batch_size": 2,
    }
    return PriceUse(**known | fields)


USES = [use("0.500"), use("0.750")]


def splits(prompts: int, templates: int | None = None) -> pl.DataFrame:
    """Calibration prompts and as many test prompts."""
    return pl.DataFrame(
        {
            "prompt_id": [f"{n:04d}" for n in range(2 * prompts)],
            "task": ["recall", "copy"] * prompts,
            "template": [
                None if templates is None else str(n // 2 % templates) for n in range(2 * prompts)
            ],
            "split": ["calibration"] * prompts + ["test"] * prompts,
        },
        schema=schema.SPLITS,
    )


def runs(prompts: int, harmed: dict[tuple[str, float], int]) -> pl.DataFrame:
    """Every prompt under both ratios at every price; the first so many are harmed."""
    rows = [
        {"model": "tiny", "press": "snapkv", "ratio": one.ratio, "prompt_id": f"{n:04d}"}
        | {"task": ("recall", "copy")[n % 2], "policy": "guard_price", "source": "live"}
        | {"shard": n % 2, "status": "ok", "harmed": n < harmed.get((one.ratio, price), 0)}
        | {"silent_harm": False, "harm_price": price, "checks": 1, "bytes_moved": 2_000_000}
        | {"tokens_wasted": 1, "device_byte_steps": 10}
        for one in USES
        for price in PRICES
        for n in range(prompts)
    ]
    return pl.DataFrame(rows, schema=schema.CERTIFYING_RUNS)


def certified(
    table: pl.DataFrame, known: pl.DataFrame, model: HarmModel = DEFAULT, **given: Any
) -> PriceCalibration:
    prompts = known.filter(split="calibration")["prompt_id"].to_list()
    settings: dict[str, Any] = {"prices": PRICES, "levels": LEVELS, "delta": DELTA}
    return certify_prices(table, known, prompts, model, USES, **settings | given)


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> PriceCalibration:
    """100 prompts, two ratios: at 0.750 the price of 300 leaves 1, that of 100 leaves 9."""
    return certified(runs(100, {("0.750", 300.0): 1, ("0.750", 100.0): 9}), splits(100))


def _found(made: PriceCalibration, ratio: str | None, level: float) -> float | None:
    for one in made.certificate.statements:
        if (one.use and one.use.ratio) == ratio and one.level == level:
            return one.certified_price
    raise AssertionError("no such statement")


def test_p_values_are_those_of_the_textbook(made: PriceCalibration) -> None:
    table = made.tables["price_certificate"]
    alone = table.filter(ratio="0.750")
    for row in alone.to_dicts():
        expected = stats.binom.cdf(row["harmed"], 100, row["level"])
        assert row["p_value"] == pytest.approx(expected, rel=1e-6)
    mixed = table.filter(pl.col("ratio").is_null(), pl.col("harm_price") == 100)
    for row in mixed.to_dicts():
        mean, level = 9 / 200, row["level"]
        assert row["observed"] == pytest.approx(mean)
        below = min(mean, level)
        excess = below * math.log(below / level) + (1 - below) * math.log((1 - below) / (1 - level))
        hoeffding = math.exp(-100 * excess)
        bentkus = math.e * stats.binom.cdf(math.ceil(100 * mean), 100, level)
        assert row["p_value"] == pytest.approx(min(hoeffding, bentkus, 1), rel=1e-6)
    assert mixed["requests"].to_list() == [200, 200]
    assert mixed["units"].to_list() == [100, 100]


def test_the_lowest_certified_price_is_the_end_of_the_sequence(made: PriceCalibration) -> None:
    # binomial: 0 and 1 of 100 show less than 5 % (0.006, 0.037), 9 not even less than 10 % (0.45)
    assert _found(made, "0.500", 0.05) == _found(made, "0.500", 0.1) == 100
    assert _found(made, "0.750", 0.05) == _found(made, "0.750", 0.1) == 300
    # mixed: 9 of 200 are shown to be below 10 % (Hoeffding and Bentkus), not below 5 %
    assert _found(made, None, 0.05) == 300
    assert made.certificate.deployed_price("tiny") == _found(made, None, 0.1)
    text = made.certificate.text
    assert "harm_price=300: with probability at least 95%, at most 5% of requests" in text
    assert "100 prompts, 200 requests" in text
    assert "NOT recorded before" in text


def test_a_price_behind_a_failure_is_not_certified() -> None:
    """1000 leaves more than 100 does: the sequence ends before it begins."""
    made = certified(runs(100, {("0.750", 1000.0): 9}), splits(100))
    assert _found(made, "0.750", 0.1) is None
    refusal = next(one.text for one in made.certificate.statements if one.use == USES[1])
    assert "no price is certified" in refusal
    assert "An infinite price is lossless" in refusal
    assert _found(made, None, 0.05) is None
    # without a certified price all is checked
    none = certified(
        runs(100, dict.fromkeys(((r, 1000.0) for r in ("0.500", "0.750")), 90)), splits(100)
    )
    assert none.certificate.deployed_price("tiny") == math.inf


def test_what_failed_or_is_unknown_counts_as_harmed() -> None:
    table = runs(60, {})
    at = pl.col("prompt_id")
    table = table.with_columns(
        harmed=pl.when(at == "0001").then(None).otherwise(pl.col("harmed")),
        status=pl.when(at == "0002").then(pl.lit("error")).otherwise(pl.col("status")),
    )
    rows = certified(table, splits(60)).tables["price_certificate"]
    assert set(rows.filter(ratio="0.500")["harmed"]) == {2}
    mixed = rows.filter(pl.col("ratio").is_null())["observed"].to_list()
    assert mixed == pytest.approx([2 / 60] * len(mixed))


def test_templates_are_units() -> None:
    known = splits(60, templates=10)
    table = certified(runs(60, {("0.500", 100.0): 20}), known).tables["price_certificate"]
    assert set(table["unit"]) == {"template"}
    assert set(table["units"]) == {20}  # 10 of each task
    row = table.filter(ratio="0.500", harm_price=100.0, level=0.1).row(0, named=True)
    shares: dict[tuple[str, str], list[bool]] = {}
    for one in known.filter(split="calibration").to_dicts():
        shares.setdefault((one["task"], one["template"]), []).append(int(one["prompt_id"]) < 20)
    assert row["observed"] == pytest.approx(np.mean([np.mean(one) for one in shares.values()]))


def test_prompts_that_fitted_do_not_certify() -> None:
    fitted = DEFAULT.model_copy(update={"provenance": {"prompts": ["0007"]}})
    with pytest.raises(LeakageError, match="0007"):
        certified(runs(20, {}), splits(20), fitted)
    gate = {"provenance": {"probability_prompts": ["0003"]}, "feature_names": []}
    with pytest.raises(LeakageError, match="0003"):
        certified(runs(20, {}), splits(20), DEFAULT.model_copy(update={"gate": gate}))
    moved = splits(20).with_columns(split=pl.lit("test"))
    with pytest.raises(LeakageError, match="may see calibration prompts only"):
        certify_prices(
            runs(20, {}),
            moved,
            [f"{n:04d}" for n in range(20)],
            DEFAULT,
            USES,
            prices=PRICES,
            levels=LEVELS,
            delta=DELTA,
        )


def test_missing_and_foreign_runs_are_named() -> None:
    with pytest.raises(ValueError, match="119 of which 119 differ"):
        certified(runs(20, {}).slice(1), splits(20))
    table = runs(20, {})
    with pytest.raises(ValueError, match="121 of which 120 differ"):
        certified(pl.concat([table, table.head(1)]), splits(20))
    with pytest.raises(LeakageError, match="0020, which is not to certify"):
        certified(runs(21, {}), splits(20))


def test_the_record_of_a_certificate(made: PriceCalibration) -> None:
    record = made.tables["leakage_check_price"].to_dicts()
    assert [(row["stage"], row["split"], row["prompts"]) for row in record] == [
        ("certificate", "calibration", 100)
    ]
    before = certified(runs(20, {}), splits(20), prior_use=PriorUse("abc", 2, True)).certificate
    assert (before.looks, before.frozen) == (2, "abc")
    assert "used for 2 certificates" in before.text
    assert "was recorded before" in before.text
    assert rows_together(runs(20, {}), 30) == 10  # shards by parity
    assert rows_together(runs(20, {}), 4) == 4


# --- validity by simulation ----------------------------------------------------------------------


def _simulated(
    rng: np.random.Generator, risks: NDArray[np.float64], prompts: int, together: bool
) -> Losses:
    """Losses of prompts under three conditions at each price.

    A prompt's luck is the same at all prices and, if ``together``, under all conditions.
    """
    luck = rng.random((prompts, 1 if together else 3))
    wrong = luck[None] < risks[:, None, None]
    return Losses(wrong.mean(axis=2).mean(axis=1), prompts, 3 * prompts)


TRUTHS = {
    "at the level": ([0.02, 0.1, 0.1], 0.1),
    "just above it at once": ([0.1001, 0.1001, 0.1001], 0.1),
    "the highest price is the worst": ([0.3, 0.02, 0.01], 0.1),
    "lower prices leave more": ([0.001, 0.02, 0.051], 0.05),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", TRUTHS)
def test_a_false_price_is_certified_in_at_most_delta_of_the_draws(
    name: str, together: bool
) -> None:
    risks, level = np.array(TRUTHS[name][0]), TRUTHS[name][1]
    rng = np.random.default_rng(len(name))
    wrong = power = 0
    for _ in range(1000):
        sure = certified_prices(_simulated(rng, risks, 120, together), level, DELTA)[1]
        wrong += bool((sure & (risks >= level)).any())
        power += bool(sure.any())
    assert wrong <= stats.binom.ppf(0.999, 1000, DELTA)
    assert power >= 600 or risks[0] > level / 2, "a test that certifies nothing shows nothing"


def test_without_an_order_or_a_unit_it_would_not_be_valid() -> None:
    """The controls: requests as units, and every price tested by itself, both err too often."""
    rng = np.random.default_rng(1)
    risks = np.array([0.1, 0.1, 0.1])
    apart = alone = 0
    for _ in range(1000):
        drawn = _simulated(rng, risks, 100, True)
        apart += bool(certified_prices(Losses(drawn.means, 300, 300), 0.1, DELTA)[1].any())
        own = [_simulated(rng, risks[:1], 100, True).means for _ in range(6)]
        separate = [Losses(means, 100, 100) for means in own]
        alone += any(certified_prices(one, 0.1, DELTA)[1].any() for one in separate)
    assert min(apart, alone) > stats.binom.ppf(0.999, 1000, DELTA)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.sampled_from([40, 120]),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_what_is_certified_is_the_start_of_the_sequence(
    counts: list[int], units: int, level: float
) -> None:
    losses = Losses(np.array(counts) / units, units, units)
    values, sure = certified_prices(losses, level, DELTA)
    length = int(sure.sum())
    assert sure[:length].all()
    assert (values[:length] <= DELTA).all()
    assert length == len(counts) or values[length] > DELTA
    stricter = certified_prices(losses, level / 2, DELTA)[1]
    assert not (stricter & ~sure).any(), "a price certified at a level is certified above it"


@given(st.data())
def test_losses_are_means_over_units(data: st.DataObject) -> None:
    cell = st.tuples(st.integers(0, 4), st.booleans())
    rows = data.draw(st.lists(cell, min_size=1, max_size=30))
    frame = pl.DataFrame(
        {"unit": [str(unit) for unit, _ in rows], "wrong": [wrong for _, wrong in rows]}
    )
    found = price_losses(frame.with_columns(harm_price=7.0), [7.0])
    shares: dict[int, list[bool]] = {}
    for unit, wrong in rows:
        shares.setdefault(unit, []).append(wrong)
    assert found.means == pytest.approx([np.mean([np.mean(one) for one in shares.values()])])
    assert (found.units, found.requests) == (len(shares), len(rows))


# --- what a guard makes of it --------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, made: PriceCalibration) -> Path:
    """A model of harm with its certificate beside it."""
    save_harm_model(DEFAULT, tmp_path / "harm_model.json")
    save_price_certificate(made.certificate, tmp_path / "price_certificate.json")
    return tmp_path / "harm_model.json"


def guarded(trained: Path, ratio: float = 0.75, **given: Any) -> KVGuard:
    settings: dict[str, Any] = {"policy": "guard_price", "predictor": trained, "harm_risk": 0.05}
    return KVGuard(kvpress.SnapKVPress(ratio, window_size=4), **settings | given)


def test_a_guard_takes_the_price_that_is_certified_for_its_press(trained: Path) -> None:
    guard = guarded(trained)
    assert (guard.harm_price, guard.bus_ratio) == (300, 50)
    (statement,) = guard.statements
    assert "at most 5% of requests are harmed" in statement.text
    assert "snapkv 0.750" in statement.text
    assert guard.certificate is not None
    assert statement.text in guard.certificate.text
    assert guarded(trained, 0.5).harm_price == 100
    plain = guarded(trained, harm_risk=None, harm_price=300)
    assert (plain.statements, plain.certificate, plain.drift) == ([], None, None)
    assert guarded(trained, harm_risk=None).harm_price == 100


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bus_ratio": 20}, r"bus_ratio=20 \(certified on 50.0\)"),
        ({"cold": "none"}, r"cold='none' \(certified on 'host'\)"),
        ({"margin_nats": 0.1}, r"margin_nats=0.1 \(certified on 0.0001\)"),
        ({"safe_ratio": 0.2}, r"safe_ratio=0.2 \(certified on 0.0\)"),
        ({"batch_size": 3}, r"batch_size=3 \(certified up to 2\)"),
        ({"task": "recall"}, r"task='recall' \(certified on recall, copy, mixed\)"),
        ({"harm_risk": 0.07}, r"no level of 0.07; its levels: 0.05, 0.1"),
        ({"ratio": 0.7}, r"ratio='0.700' \(certified on '0.750'\)"),
        ({"ratio": 0.6}, r"ratio='0.600' \(certified on '0.500'\)"),
    ],
)
def test_another_use_is_refused_by_name(trained: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(CertificateError, match=named):
        guarded(trained, **options)


def test_another_press_is_refused_by_name(trained: Path) -> None:
    settings: dict[str, Any] = {"policy": "guard_price", "predictor": trained, "harm_risk": 0.05}
    with pytest.raises(CertificateError, match="press_class='KnormPress'"):
        KVGuard(kvpress.KnormPress(0.5), **settings)
    with pytest.raises(CertificateError, match="window_size=8"):
        KVGuard(kvpress.SnapKVPress(0.5, window_size=8), **settings)
    with pytest.raises(CertificateError, match=r"alone \(SnapKVPress 0.500, SnapKVPress 0.750\)"):
        KVGuard(kvpress.KnormPress(0.5), **settings)


def test_the_press_that_was_certified_is_the_nearest_use(made: PriceCalibration) -> None:
    """Its ratio and batch differ; the other press's class alone does."""
    other = {"press": "knorm", "press_class": "KnormPress", "press_settings": {"kwargs": {}}}
    statements = [
        one
        if one.use is None or one.use.ratio != "0.750"
        else one.model_copy(update={"use": one.use.model_copy(update=other)})
        for one in made.certificate.statements
    ]
    certificate = made.certificate.model_copy(update={"statements": statements})
    press = kvpress.SnapKVPress(0.75, window_size=4)
    with pytest.raises(CertificateError, match=r"of ratio='0.750' \(certified on '0.500'\)"):
        certified_price(certificate, 0.05, press=press)


def test_a_level_without_a_price_is_refused_with_its_reason(tmp_path: Path) -> None:
    made = certified(runs(40, {}), splits(40))  # 59 prompts without harm would do
    save_harm_model(DEFAULT, tmp_path / "harm_model.json")
    save_price_certificate(made.certificate, tmp_path / "price_certificate.json")
    with pytest.raises(CertificateError, match="it takes at least 59 such prompts, 19 more") as no:
        guarded(tmp_path / "harm_model.json")
    assert str(no.value).endswith("This use has a price at harm_risk=0.1.")
    assert guarded(tmp_path / "harm_model.json", harm_risk=0.1).harm_price == 100


def test_a_certificate_belongs_to_one_model_of_harm(trained: Path) -> None:
    other = DEFAULT.alone.model_copy(update={"intercept": 0.6})
    save_harm_model(DEFAULT.model_copy(update={"alone": other}), trained)
    with pytest.raises(CertificateError, match="speaks of the model of harm"):
        guarded(trained)
    save_harm_model(DEFAULT.model_copy(update={"provenance": {"from": "elsewhere"}}), trained)
    assert guarded(trained).harm_price == 300
    (trained.parent / "price_certificate.json").unlink()
    with pytest.raises(CertificateError, match=r"no price certificate at .*price_certificate.json"):
        guarded(trained)


def test_bad_arguments_are_refused(trained: Path) -> None:
    for options in ({"harm_price": 3.0}, {"harm_risk": 1.0}, {"policy": "guard"}):
        with pytest.raises(GuardError, match="harm_risk lies in"):
            guarded(trained, **options)
    with pytest.raises(GuardError, match="harm_risk is what the certificate beside"):
        guarded(trained, predictor=DEFAULT)
    with pytest.raises(GuardError, match="harm_risk is what the certificate beside"):
        guarded(trained, predictor="rules")


def test_a_call_is_held_to_model_length_and_rows(
    tmp_path: Path, trained: Path, tiny_llama: PreTrainedModel
) -> None:
    folder = tmp_path / "checkpoints" / "tiny"
    tiny_llama.save_pretrained(folder)
    draw = np.random.default_rng(1)
    requests = [Request(str(i), draw.integers(4, 160, 24).tolist()) for i in range(3)]
    guard = guarded(trained)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(CertificateError, match=r"a model without a kvguard_model.json"):
        guard.run(model, requests, Decoding(12, (2,)))
    (folder / RECORD).write_text(json.dumps({"digest": "another"}))
    with pytest.raises(CertificateError, match="model_digest='another'"):
        guard.run(model, requests, Decoding(12, (2,)))
    (folder / RECORD).write_text(json.dumps({"digest": DIGEST}))
    with pytest.raises(CertificateError, match=r"max_new_tokens=13 \(certified on 12, 16\)"):
        guard.run(model, requests, Decoding(13, (2,)))
    with pytest.raises(CertificateError, match=r"decoding='sampling at temperature 0\.5"):
        guard.run(model, requests, Decoding(12, (2,), do_sample=True, temperature=0.5))
    done = guard.run(model, requests, Decoding(16, (2,)))
    assert [one.error for one in done] == [None] * 3

    class Stream:
        def put(self, tokens: object) -> None: ...

    with pytest.raises(CertificateError, match=r"holdback_tokens=16 would release tokens of 40"):
        check_streaming(Stream(), 0.05, 16, 40)
    early = guarded(trained, holdback_tokens=3, streamer=Stream())
    with pytest.raises(CertificateError, match="holdback_tokens=3"):
        early.run(model, requests[:1], Decoding(16, (2,)))
    late = guarded(trained, holdback_tokens=16, streamer=Stream())
    (whole,) = late.run(model, requests[:1], Decoding(16, (2,)))
    assert len(whole.token_ids) <= 16

    guard.save(tmp_path / "saved")
    again = KVGuard.load(tmp_path / "saved")
    assert (again.harm_risk, again.harm_price) == (0.05, 300)
    assert again.statements == guard.statements
    rerun = again.run(model, requests, Decoding(16, (2,)))
    assert [one.token_ids for one in rerun] == [one.token_ids for one in done]
    plain = guarded(trained, harm_risk=None, harm_price=300, bus_ratio=50)
    plain.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "price_certificate.json").exists()


def test_a_certificate_survives_its_file(tmp_path: Path, made: PriceCalibration) -> None:
    path = tmp_path / "price_certificate.json"
    save_price_certificate(made.certificate, path)
    assert load_price_certificate(path) == made.certificate
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "not a price certificate of format 1"),
        ('{"format": 1}', "is not a price certificate"),
    ):
        path.write_text(content)
        with pytest.raises(CertificateError, match=message):
            load_price_certificate(path)


# --- the run -------------------------------------------------------------------------------------


def experiment(**live: Any) -> Any:
    return load_config(
        Path(__file__).parents[1] / "config.yaml",
        overrides={"guard": {"bus_ratio": 50}, "generation": {"batch_size": 8}, "live": live},
    )


def test_a_run_at_the_certified_price(tmp_path: Path, made: PriceCalibration) -> None:
    asked = experiment(certify_prices=[100, 1000, 300], harm_price="certified")
    assert asked.live.prices_tested == [1000, 300, 100]
    path = tmp_path / "price_certificate.json"
    save_price_certificate(made.certificate, path)
    with pytest.raises(ValueError, match="needs the price that is certified"):
        make_policy("guard_price", 1, max_new_tokens=8, live=asked.live)
    price = at_certified_price(asked, path, "tiny").live.harm_price
    assert price == made.certificate.deployed_price("tiny")
    assert at_certified_price(asked, None, "tiny") is asked
    with pytest.raises(CertificateError, match="'other'"):
        at_certified_price(asked, path, "other")


def test_uses_of_an_experiment_name_everything() -> None:
    asked = experiment(certify_prices=[100])
    found = [PriceUse(**one, model_digest=DIGEST) for one in price_uses(asked)]
    pairs = [(one.press, one.ratio) for one in found]
    assert pairs == asked.live_conditions
    assert {one.bus_ratio for one in found} == {50}
    assert list(found[0].tasks) == [task.name for task in asked.tasks]


def test_what_cannot_be_certified_is_refused_before_any_job() -> None:
    for live, over, message in (
        ({"certify_prices": [100]}, {"guard": {"bus_ratio": None}}, "guard.bus_ratio"),
        ({"certify_prices": [100]}, {"generation": {"batch_size": "auto"}}, "batch_size"),
        ({"harm_price": "certified"}, {}, "certify_prices: harm_price is 'certified'"),
        ({"certify_prices": [100, 100.0]}, {}, "each is listed once"),
        ({"certify_prices": [-1]}, {}, "certify_prices"),
        ({"certify_levels": []}, {}, "certify_levels"),
    ):
        base = {"guard": {"bus_ratio": 50}, "generation": {"batch_size": 8}}
        with pytest.raises(ConfigError, match=message):
            load_config(
                Path(__file__).parents[1] / "config.yaml", overrides=base | over | {"live": live}
            )


def test_a_price_that_did_not_run_on_a_prompt_is_named(tmp_path: Path) -> None:
    asked = experiment(certify_prices=[100], conditions=[("snapkv", 0.4)], policies=[])
    splits(4).write_parquet(tmp_path / "splits.parquet")
    certifying = calibration_parts(splits(4), asked.probability_share)[1]
    folder = tmp_path / "certifying" / asked.models[0].name / "snapkv" / "0.400" / "100"
    table = runs(4, {}).filter(ratio="0.500", harm_price=100.0)
    schema.write_table(table.filter(pl.col("prompt_id").is_in(certifying)), folder / "00.parquet")
    assert list(CHECKS["live runs"](asked, tmp_path)) == [None]
    schema.write_table(table, folder / "00.parquet")
    (problem,) = CHECKS["live runs"](asked, tmp_path)
    assert problem is not None
    assert f"{4 - len(certifying)} prompts are missing or not of the certifying part" in problem


def test_findings_say_what_is_certified(tmp_path: Path, made: PriceCalibration) -> None:
    assert price_sections(tmp_path) == []
    (tmp_path / "models").mkdir()
    save_price_certificate(made.certificate, tmp_path / "models" / "price_certificate.json")
    table = made.tables["price_certificate"]
    schema.write_table(table, tmp_path / "tables" / "price_certificate.parquet")
    (text,) = price_sections(tmp_path)
    assert text == price_section(made.certificate, table)
    assert "snapkv 0.750, at most 5% harmed: certified down to `harm_price=300`" in text
    rows = [line for line in text.splitlines() if line.startswith("| tiny, snapkv 0.750 | 100 |")]
    (cells,) = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    most = stats.beta.ppf(0.95, 10, 91)
    assert cells[2:6] == ["9 of 100", "0", "9.0%", f"{most:.1%}"]
    assert isinstance(made.certificate, PriceCertificate)
