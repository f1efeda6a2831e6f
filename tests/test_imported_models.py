"""Models of another run: taken where they fit, refused by name where they do not."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from source_run import CODE, SOURCE, finish, make_record, make_source

from kvguard import schema
from kvguard.config import Config, ConfigError, config_part, overlay, parse_config
from kvguard.files import DamagedFile, file_sha256
from kvguard.guard_report import GuardError
from kvguard.imported_models import (
    ImportedModelsError,
    check_imported,
    check_source,
    import_models,
    origin_table,
    read_origin,
    source_digest,
    trained_by,
)
from kvguard.prompts import load_tasks, prompts_frame
from kvguard.rival_settings import load_rivals
from kvguard.splits import calibration_parts, split_prompts

OWN = {
    "name": "own",
    "seed": 2,
    "results_dir": "results/own",
    "splits": {"train": 0, "calibration": 0.5, "test": 0.5},
}
"""What the run with another one's models has of its own."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run that trained; paths are taken from where the configuration is."""
    monkeypatch.chdir(tmp_path)
    make_source(Path("results/source"))
    return Path("results/source")


def own_config(**changes: Any) -> Config:
    """The configuration of a run with the models of `source`."""
    values = overlay(SOURCE | OWN | {"predictor": {"trained_by": "results/source"}}, changes)
    return parse_config(values, check_files=False)


def prompts_of(config: Config) -> pl.DataFrame:
    return prompts_frame(load_tasks(config.tasks, config.seed)[0])


def take(config: Config, model_digest: str = "of tiny", prompts: pl.DataFrame | None = None) -> Any:
    """Import as the rule does, with the part of the configuration that its job gets."""
    values = config.model_dump(mode="json", by_alias=True)
    names = ("models", "tasks", "presses", "generation", "predictor", "live")
    part = config_part({name: values[name] for name in names})
    checkpoints = {
        model.name: make_record(Path("results/own/checkpoints") / model.name, model_digest)
        for model in config.models
    }
    own = prompts_of(config) if prompts is None else prompts
    return import_models(part, own, checkpoints, Path("results/own/models"))


def test_models_are_copied_with_a_record_of_where_they_come_from(source: Path) -> None:
    origin = take(own_config())
    copied = Path("results/own/models/harm_model.json")
    assert copied.read_bytes() == (source / "models/harm_model.json").read_bytes()
    assert not Path("results/own/models/certificate.json").exists(), "no policy reads it"
    assert origin == read_origin("results/own/models")
    digest = origin.manifest_sha256[:16]
    assert trained_by("results/own/models") == f"the run source (manifest {digest})"
    assert trained_by("results/source/models") is None
    assert origin.run == "source"
    assert origin.manifest_sha256 == file_sha256(source / "manifest.json")
    assert origin.files["harm_model.json"].code == CODE
    assert (origin.train_prompts, origin.calibration_prompts) == (6, 3)
    assert origin.transfer == ()
    assert "none of them is a prompt of this run" in origin.text
    table = origin_table(origin)
    assert table["file"].to_list() == ["harm_model.json", "rivals.json"]
    assert table["transfer"].null_count() == 2


def test_a_folder_without_a_finished_run_is_refused(source: Path) -> None:
    (source / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"predictor.trained_by: .*finished run.*manifest.json"):
        check_source(own_config())


def test_a_run_that_imported_its_models_itself_is_refused(source: Path) -> None:
    make_source(source, predictor={"trained_by": "results/first"})
    with pytest.raises(ConfigError, match="uses the models of results/first: name that"):
        check_source(own_config())


def test_a_run_outlives_the_one_that_trained_its_models(source: Path) -> None:
    recorded = take(own_config()).manifest_sha256
    assert source_digest(own_config()) == recorded
    source.rename("results/elsewhere")
    assert source_digest(own_config()) == recorded
    Path("results/own/models/origin.json").unlink()
    with pytest.raises(ConfigError, match="finished run"):
        source_digest(own_config())


def test_its_own_folder_is_no_other_run() -> None:
    with pytest.raises(ConfigError, match="another run's folder than results_dir"):
        own_config(results_dir="results/source")


def test_a_policy_whose_model_was_not_trained_is_refused(source: Path) -> None:
    config = own_config(live={"policies": ["none", "gate"]})
    with pytest.raises(ConfigError, match=r"live.policies: gate read models/baselines.json"):
        check_source(config)


@pytest.mark.parametrize("policy", ["random", "constant"])
def test_rivals_that_are_matched_to_a_simulation_are_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"live.policies.1: '{policy}' is matched to a simu"):
        own_config(live={"policies": ["none", policy]})


def test_a_press_of_that_name_with_other_settings_is_refused(source: Path) -> None:
    press = SOURCE["presses"][0] | {"kwargs": {"window_size": 16}}
    with pytest.raises(ConfigError, match=r"presses: snapkv is .*16.* here and .*8"):
        check_source(own_config(presses=[press]))


def test_a_condition_without_thresholds_is_refused_where_they_are_read(source: Path) -> None:
    press = SOURCE["presses"][0] | {"ratios": [0.6], "live_ratios": [0.6]}
    with pytest.raises(ConfigError, match=r"clock_or_loop need thresholds.* snapkv 0.600"):
        check_source(own_config(presses=[press]))
    check_source(own_config(presses=[press], live={"policies": ["none", "guard_price"]}))


def test_prompts_that_trained_are_counted_and_refused(source: Path) -> None:
    config = own_config(seed=1)
    with pytest.raises(ImportedModelsError, match="9 of 12 prompts of this run trained or"):
        take(config)
    assert not Path("results/own/models").exists()


def test_the_same_question_under_another_name_is_the_same_prompt(source: Path) -> None:
    own = prompts_of(own_config())
    trained = schema.read_table(source / "prompts/prompts.parquet").join(
        schema.read_table(source / "splits.parquet").filter(pl.col("split") == "train"),
        on="prompt_id",
        how="semi",
    )
    copied = own.with_columns(
        question=pl.Series([f"{trained['question'][0]} ", *own["question"][1:]])
    )
    with pytest.raises(ImportedModelsError, match="1 of 12 prompts"):
        take(own_config(), prompts=copied)


def test_test_prompts_of_the_other_run_are_counted_and_allowed(source: Path) -> None:
    theirs = schema.read_table(source / "prompts/prompts.parquet").join(
        schema.read_table(source / "splits.parquet").filter(pl.col("split") == "test"),
        on="prompt_id",
        how="semi",
    )
    origin = take(own_config(), prompts=theirs)
    assert origin.tested_there == theirs.height > 0
    assert f"{theirs.height} prompts of this run were test prompts there" in origin.text


def test_a_file_that_is_not_what_was_written_is_refused(source: Path) -> None:
    path = source / "models/harm_model.json"
    path.write_text(path.read_text().replace("0.54", "0.55"))
    with pytest.raises(DamagedFile, match=r"harm_model.json is damaged"):
        take(own_config())


def test_a_file_that_is_not_the_manifest_s_is_refused(source: Path) -> None:
    make_source(source, seed=7)
    listed = json.loads((source / "manifest.json").read_text())
    listed["models/harm_model.json"]["sha256"] = "0" * 64
    (source / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(DamagedFile, match=r"not the one in manifest.json"):
        take(own_config())


def test_a_model_of_other_features_is_refused(source: Path) -> None:
    path = source / "models/harm_model.json"
    content = json.loads(path.read_text()) | {"gate": {"feature_version": 0}}
    with schema.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content))
    finish(source)
    with pytest.raises(GuardError, match="feature version"):
        take(own_config())


def test_what_the_models_were_not_trained_on_is_recorded(source: Path) -> None:
    press = SOURCE["presses"][0] | {"ratios": [0.6], "live_ratios": [0.6]}
    other = {"name": "knorm", "class": "KnormPress", "ratios": [0.2]}
    tasks = [SOURCE["tasks"][0] | {"items": 5}, {"kind": "copy", "num_prompts": 12}]
    config = own_config(
        presses=[press, other],
        tasks=tasks,
        models=[SOURCE["models"][0] | {"name": "larger"}],
        generation={"do_sample": True},
        live={"policies": ["none", "guard_price"]},
    )
    origin = take(config, model_digest="of a larger one")
    assert origin.transfer == (
        "model larger (trained on tiny)",
        "task recall with other items",
        "task copy (trained on recall)",
        "snapkv 0.600 (trained at 0.500, 0.750)",
        "press knorm (trained on snapkv)",
        "sampling at temperature 1 (trained greedy)",
    )
    assert origin_table(origin)["transfer"][0].startswith("model larger (trained on tiny); ")


def test_thresholds_of_rivals_go_to_this_run_s_names(source: Path) -> None:
    take(own_config(models=[SOURCE["models"][0] | {"name": "larger"}]), "of a larger one")
    settings = load_rivals("results/own/models/rivals.json")
    assert set(settings) == {("larger", "snapkv", "0.750")}
    assert settings["larger", "snapkv", "0.750"].clock_tokens == 5


def test_thresholds_of_several_models_are_nobody_else_s(source: Path) -> None:
    models = [SOURCE["models"][0], SOURCE["models"][0] | {"name": "second"}]
    make_source(source, models=models)
    with pytest.raises(ImportedModelsError, match="whose thresholds tiny would get is not known"):
        take(own_config(), "of a third")


def test_verify_names_a_copy_that_is_another_one(source: Path) -> None:
    take(own_config())
    results = Path("results/own")
    assert [problem for problem in check_imported(own_config(), results) if problem] == []
    copied = results / "models/harm_model.json"
    copied.write_text(copied.read_text().replace("0.54", "0.55"))
    (source / "manifest.json").write_text("{}")
    found = [problem for problem in check_imported(own_config(), results) if problem]
    trains = parse_config(SOURCE, check_files=False)
    own = "models/origin.json: this run trained its models itself"
    assert list(check_imported(trains, results)) == [own]
    assert found == [
        "models/harm_model.json: not the file that source trained",
        "models/origin.json: results/source/manifest.json is another one now",
    ]


def test_only_an_importing_run_that_certifies_nothing_may_share() -> None:
    """Stored traces held copies, and a price certificate is about rows that did."""
    assert own_config(guard={"sharing": "all"}).guard.sharing == "all"
    prices = {"harm_price": 100, "certify_prices": [100]}
    with pytest.raises(ConfigError, match=r"guard.sharing: 'none' unless .* got 'full'"):
        own_config(guard={"sharing": "full", "bus_ratio": 50}, live=prices)
    with pytest.raises(ConfigError, match=r"guard.sharing: 'none' unless predictor.trained_by"):
        parse_config(SOURCE | {"guard": {"sharing": "all"}}, check_files=False)


def test_a_run_that_trains_needs_prompts_to_train_on() -> None:
    with pytest.raises(ConfigError, match=r"splits.train: above 0, or predictor.trained_by"):
        parse_config(SOURCE | {"splits": OWN["splits"]}, check_files=False)


def test_without_training_all_prompts_certify_or_test(source: Path) -> None:
    config = own_config()
    splits = split_prompts(prompts_of(config), config.splits, config.seed)
    assert splits["split"].value_counts().sort("split").rows() == [("calibration", 6), ("test", 6)]
    fitted, certify = calibration_parts(splits, config.probability_share)
    assert (len(fitted), len(certify)) == (0, 6)


def test_a_run_that_trains_is_recorded_as_before() -> None:
    config = parse_config(SOURCE, check_files=False)
    assert "trained_by" not in config.model_dump(mode="json")["predictor"]
    assert "trained_by" in own_config().model_dump(mode="json")["predictor"]


def test_a_live_job_reads_a_certified_price_without_the_grid() -> None:
    live = {"harm_price": "certified", "policies": ["guard_price"]}
    with pytest.raises(ConfigError, match=r"live.certify_prices: harm_price is 'certified'"):
        own_config(live=live)
    config = own_config(live=live | {"certify_prices": [30.0]}, guard={"bus_ratio": 50})
    settings = config.model_dump(mode="json")["live"]
    del settings["certify_prices"]
    assert config_part({"live": settings}).live.harm_price == "certified"
