"""A guard goes by its certificate where the certificate speaks of what it does, nowhere else."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import pytest
import xgboost
from test_calibration import _tables, certified
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvguard import schema
from kvguard.certificate import Certificate, CertificateError, Use, save_certificate
from kvguard.config import OperatingPoint, load_config
from kvguard.guard import KVGuard
from kvguard.guard_report import GuardError
from kvguard.models import RECORD
from kvguard.predictor import Predictor, save_predictor
from kvguard.requests import Request
from kvguard.sampling import Decoding
from kvguard.workflow import certificate_uses, config_layers

DIGEST = "0123456789abcdef"
USE = Use(
    model="tiny",
    model_digest=DIGEST,
    press="snapkv",
    press_class="SnapKVPress",
    phase="prefill",
    press_settings={"kwargs": {"window_size": 4}},
    ratio="0.500",
    task="recall",
    max_new_tokens=12,
    decoding="greedy",
    check_every_tokens=8,
    recovery="continue",
)
DECODING = Decoding(12, (2,))


def press() -> kvpress.SnapKVPress:
    return kvpress.SnapKVPress(0.5, window_size=4)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """A trained one: boosted trees on two features."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(300, 2))
    booster = xgboost.train(
        {"objective": "binary:logistic", "max_depth": 2},
        xgboost.DMatrix(rows, label=rows[:, 0] > 0.5),
        num_boost_round=4,
    )
    names = ("entropy", "top1_probability")
    assert set(names) <= set(schema.FEATURE_NAMES)
    return Predictor(
        kind="xgboost",
        target="any",
        horizon_tokens=32,
        feature_names=names,
        feature_version=schema.FEATURE_VERSION,
        model={
            "booster": json.loads(bytes(booster.save_raw("json"))),
            "class_weight": 1.0,
            "lead_bins": 0,
        },
    )


@pytest.fixture(scope="module")
def certificate(predictor: Predictor) -> Certificate:
    """Statements about one use, for every operating point."""
    made = certified(_tables(8))
    point = made.statements[0].operating_point
    first = {one.operating_point: one for one in made.statements}
    assert point in first
    return made.model_copy(
        update={
            "predictor_digest": predictor.digest,
            "statements": [one.model_copy(update={"use": USE}) for one in first.values()],
        }
    )


@pytest.fixture
def trained(tmp_path: Path, predictor: Predictor, certificate: Certificate) -> Path:
    """The predictor's file, its certificate beside it."""
    save_predictor(predictor, tmp_path / "hazard_predictor.json")
    save_certificate(certificate, tmp_path / "certificate.json")
    return tmp_path / "hazard_predictor.json"


@pytest.fixture
def prepared(tmp_path: Path, tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """The tiny model as a user loads it from a folder that the pipeline prepared."""
    folder = tmp_path / "checkpoints" / "tiny"
    tiny_llama.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps({"digest": DIGEST}))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def requests(count: int = 3) -> list[Request]:
    draw = np.random.default_rng(1)
    return [Request(str(i), draw.integers(4, 160, 24).tolist()) for i in range(count)]


def test_a_certified_use_runs_and_is_stated(trained: Path, prepared: PreTrainedModel) -> None:
    guard = KVGuard(press(), predictor=trained, task="recall")
    done = guard.run(prepared, requests(), DECODING)
    assert [completion.error for completion in done] == [None] * 3
    (statement,) = guard.statements
    assert statement.use == USE
    assert statement.operating_point == "balanced"
    assert guard.drift is not None
    assert guard.drift.requests == 3
    reference = guard.drift.reference  # of this press and ratio, not of all pooled
    assert (reference.press, reference.ratio) == ("snapkv", "0.500")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"press": kvpress.KnormPress(0.5)}, "press_class='KnormPress'"),
        ({"press": kvpress.SnapKVPress(0.6, window_size=4)}, r"ratio='0\.600'.*'0\.500'"),
        ({"press": kvpress.SnapKVPress(0.5)}, r"window_size=64 \(certified on 4\)"),
        (
            {"press": kvpress.SnapKVPress(0.5, window_size=4, kernel_size=3)},
            r"kernel_size=3 \(certified on 5\)",
        ),
        (
            {
                "press": kvpress.CompressionRatioDecodingPress(
                    base_press=kvpress.SnapKVPress(window_size=4), target_compression_ratio=0.5
                )
            },
            r"phase='decode' \(certified on 'prefill'\)",
        ),
        ({"press": None}, "press_class='none'"),
        ({"task": "copy"}, r"task='copy' \(certified on 'recall'\)"),
        ({"recovery": "promote"}, r"recovery='promote' \(certified on 'continue'\)"),
        ({"check_every_tokens": 4}, r"check_every_tokens=4 \(certified on 8\)"),
        ({"safe_ratio": 0.25}, r"safe_ratio=0\.25 \(certified on 0\)"),
        ({"sharing": "all"}, "sharing='all'"),
    ],
)
def test_another_use_is_refused_by_name(trained: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(CertificateError, match=named):
        KVGuard(**{"press": press(), "predictor": trained} | options)
    own = {"operating_point": {"tau_low": 0.2, "tau_high": 0.4, "k": 1, "j": 4}}
    guard = KVGuard(**{"press": press(), "predictor": trained} | options | own)
    assert guard.statements == []
    assert guard.drift is None


def test_another_model_length_or_sampling_is_refused_by_name(
    trained: Path, prepared: PreTrainedModel, tiny_llama: PreTrainedModel
) -> None:
    guard = KVGuard(press(), predictor=trained)
    with pytest.raises(CertificateError, match=r"max_new_tokens=20 \(certified on 12\)"):
        guard.run(prepared, requests(), Decoding(20, (2,)))
    with pytest.raises(CertificateError, match=r"decoding='sampling at temperature 0\.7"):
        guard.run(prepared, requests(), Decoding(12, (2,), do_sample=True, temperature=0.7))
    with pytest.raises(CertificateError, match=f"no {RECORD} says which it is"):
        guard.run(tiny_llama, requests(), DECODING)
    record = Path(prepared.name_or_path) / RECORD
    record.write_text(json.dumps({"digest": "f" * 16}))
    with pytest.raises(CertificateError, match=rf"model_digest='{'f' * 16}' .*'{DIGEST}'"):
        guard.run(prepared, requests(), DECODING)


def test_what_a_certificate_did_not_record_binds_nothing(
    trained: Path, certificate: Certificate, tiny_llama: PreTrainedModel
) -> None:
    """Certificates of earlier versions, and those made without `Use`s."""
    bare = USE.model_copy(
        update={
            "model_digest": None,
            "press_settings": None,
            "decoding": "",
            "max_new_tokens": 0,
            "check_every_tokens": 0,
        }
    )
    stated = [one.model_copy(update={"use": bare}) for one in certificate.statements]
    save_certificate(
        certificate.model_copy(update={"statements": stated}),
        trained.with_name("certificate.json"),
    )
    guard = KVGuard(kvpress.SnapKVPress(0.5, window_size=8), predictor=trained)
    done = guard.run(tiny_llama, requests(), Decoding(9, (2,)))
    assert [completion.error for completion in done] == [None] * 3


def test_the_uses_of_an_experiment_name_everything(tmp_path: Path) -> None:
    experiment = load_config(*config_layers(None))
    for entry in certificate_uses(experiment):
        use = Use(**entry, model_digest=DIGEST)
        assert all(use.model_dump().values())


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            {"tau_low": 0.9, "tau_high": 0.2, "k": 1, "j": 1},
            r"^operating_point: tau_low=0\.9 must not exceed tau_high=0\.2, got \{",
        ),
        ({"tau_low": 0.1, "tau_high": 0.2, "k": 1}, r"^operating_point\.j: Field required"),
        (
            {"tau_low": 0.1, "tau_high": 0.2, "k": 1, "j": 1, "tau": 3},
            r"^operating_point\.tau: Extra inputs are not permitted, got 3",
        ),
    ],
)
def test_thresholds_that_cannot_be_are_named(point: dict[str, float], message: str) -> None:
    with pytest.raises(GuardError, match=message):
        KVGuard(press(), operating_point=point)


def test_a_certified_guard_survives_its_folder_and_a_pickle(
    trained: Path, prepared: PreTrainedModel, tmp_path: Path
) -> None:
    guard = KVGuard(press(), predictor=trained, operating_point="aggressive", task="recall")
    expected = [one.token_ids for one in guard.run(prepared, requests(), DECODING)]
    alarms = [report.alarm_steps for report in guard.report]
    guard.save(tmp_path / "guard")
    trained.unlink()  # what was saved needs nothing of where it came from
    for again in (KVGuard.load(tmp_path / "guard"), pickle.loads(pickle.dumps(guard))):
        assert again.certificate == guard.certificate
        assert again.statements == guard.statements
        assert again.operating_point == guard.operating_point
        assert [one.token_ids for one in again.run(prepared, requests(), DECODING)] == expected
        assert [report.alarm_steps for report in again.report] == alarms
        with pytest.raises(CertificateError, match="max_new_tokens=20"):
            again.run(prepared, requests(), Decoding(20, (2,)))
    certificate = tmp_path / "guard" / "certificate.json"
    stale = json.loads(certificate.read_text())
    certificate.write_text(json.dumps(stale | {"predictor_digest": "0" * 16}))
    with pytest.raises(CertificateError, match="calibrate again"):
        KVGuard.load(tmp_path / "guard")
    predictor = tmp_path / "guard" / "hazard_predictor.json"
    point = OperatingPoint(tau_low=0.2, tau_high=0.4, k=1, j=4)
    own = KVGuard(press(), predictor=predictor, operating_point=point)
    assert own.certificate is None, "of another predictor, and not needed for these thresholds"


@pytest.mark.matrix
def test_a_pickled_guard_is_whole_in_another_process(trained: Path, tmp_path: Path) -> None:
    guard = KVGuard(press(), predictor=trained)
    (tmp_path / "guard.pickle").write_bytes(pickle.dumps(guard))
    features = np.random.default_rng(2).normal(size=(5, len(schema.FEATURE_NAMES)))
    np.save(tmp_path / "features.npy", features.astype(np.float32))
    code = (
        "import pickle, numpy as np; from pathlib import Path\n"
        "guard = pickle.loads(Path('guard.pickle').read_bytes())\n"
        "print(guard.predictor.predict(np.load('features.npy')).tolist())\n"
        "print(guard.statements[0].use.press)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    hazards, name = done.stdout.splitlines()
    assert guard.predictor is not None
    assert json.loads(hazards) == guard.predictor.predict(features.astype(np.float32)).tolist()
    assert name == "snapkv"
