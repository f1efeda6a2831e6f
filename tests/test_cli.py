"""The command line: lines that must work as written, and clean endings for wrong input."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from conftest import CHECKOUT, make_tiny_model, make_tiny_tokenizer, share_code_digests
from rich.console import Console
from synthetic import make_run, write_run

from kvguard import __version__, cli, cli_tables, evaluate_controller, live, progress, schema
from kvguard.certificate import load_certificate
from kvguard.config import ConfigError, load_config
from kvguard.database import build_database
from kvguard.feature_files import build_features
from kvguard.labeling import build_labels
from kvguard.predictor import rules_predictor, save_predictor
from kvguard.prompts import load_tasks, prompts_frame
from kvguard.splits import split_prompts
from kvguard.workflow import (
    press_entry,
    press_experiment,
    recorded_config,
    short_name,
    snake_name,
    stale_lock,
)


def kvguard(line: str, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """Run one command line as a user types it."""
    words = shlex.split(line)
    assert words[0] == "kvguard"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [str(Path(sys.executable).with_name("kvguard")), *words[1:]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run a command line in this process: quicker, for commands that start no job."""

    def run(line: str, cwd: Path = CHECKOUT) -> Ended:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(cli_tables, "console", Console(width=200))
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as ended:
            cli.app()
        return Ended(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train`, `eval-controller` and `analyze` read of a run, made without a model."""
    folder = tmp_path_factory.mktemp("results")
    run = make_run(num_prompts=24, shard_size=24, error_rate=0)
    files = write_run(run, folder)
    config = load_config(
        CHECKOUT / "config.yaml",
        overrides={
            "models": [
                {"name": "tiny", "source": "hub", "repository": "a/tiny", "revision": "0" * 40}
            ],
            "tasks": [{"kind": "gsm_symbolic", "num_prompts": 24}],
            "presses": [{"name": "snapkv", "class": "SnapKVPress", "ratios": [0.5, 0.75]}],
            "generation": {"shard_size": 24, "max_new_tokens": 64},
            "live": {"conditions": []},
            "predictor": {"search_trials": 0, "bootstrap_samples": 50, "targets": ["any"]},
        },
    )
    record = config.model_dump(mode="json", by_alias=True)
    (folder / "config.json").write_text(json.dumps(record))
    splits = split_prompts(run.prompts["prompt_id"], config.splits, 0)
    schema.write_table(splits, folder / "splits.parquet", schema.SPLITS)
    build_labels(files.tokens, run.outcomes, config.labels, folder / "labels.parquet")
    build_features(files.tokens, files.traces, folder / "features.parquet")
    build_database(
        folder / "kvguard.duckdb", files.prompts, files.traces, files.tokens, files.outcomes
    )
    return folder


COMMANDS = (
    "run",
    "sweep",
    "analyze",
    "verify",
    "train",
    "calibrate",
    "eval-controller",
    "signals",
    "live",
    "figures",
    "status",
    "findings",
)


def test_help_is_quick_and_lists_the_commands() -> None:
    done = kvguard("kvguard --help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f" {name} " in done.stdout
    probe = "import sys, kvguard.cli; print('torch' in sys.modules, 'polars' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert loaded.stdout.split()[0] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, command: Callable[..., Ended]) -> None:
    done = command(f"kvguard {name} --help")
    assert done.returncode == 0
    assert "Usage: kvguard" in done.stdout


def test_sweep_plans_the_large_model() -> None:
    done = kvguard('kvguard sweep --num-prompts 500 --model "Qwen/Qwen2.5-7B-Instruct" --dry-run')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 prompts" in done.stdout  # 500 of each of the two tasks
    assert "results/sweeps/qwen2.5-7b-500/traces/qwen2.5-7b/snapkv/0.400/00.parquet" in done.stdout
    assert not (CHECKOUT / "results/sweeps").exists()


@pytest.fixture
def short(smollm2_folder: Path, tmp_path: Path) -> str:
    """Options of a quick run of the embedded model: no examples, few tokens."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "smollm2-135m").symlink_to(smollm2_folder)
    overlay = tmp_path / "short.yaml"
    overlay.write_text("tasks: [{kind: gsm_symbolic, num_prompts: 2, few_shot: 0}]\n")
    return f"--num-prompts 2 --max-new-tokens 6 --config {overlay} --results-dir {tmp_path}"


def test_run_shows_every_answer(short: str) -> None:
    done = kvguard(f"kvguard run --press streaming_llm --compression-ratio 0.875 {short}")
    assert done.returncode == 0, done.stderr
    assert "streaming_llm 0.875" in done.stdout
    assert "2 of 2 prompts ran" in done.stdout
    kept = re.search(r"cache after the press: ([0-9.]+)%", done.stdout)
    assert kept is not None
    assert 11.5 < float(kept[1]) <= 12.5, "whole entries of two short prompts"


def test_live_compares_policies(short: str) -> None:
    done = kvguard(f"kvguard live --policy none --policy verify_all {short}")
    assert done.returncode == 0, done.stderr
    lines = [line.split("│") for line in done.stdout.splitlines() if "│" in line]
    rows = {line[1].strip(): line for line in reversed(lines)}  # of the first table
    assert {"none", "verify_all"} <= set(rows)
    assert "harmed" in done.stdout
    assert rows["verify_all"][3].strip().startswith("0.00"), "checked to the end: no harm is left"


@pytest.fixture
def tiny_run(tmp_path: Path) -> str:
    """Options of a quick live run of the tiny model beside a run whose splits are there."""
    make_tiny_model("llama").save_pretrained(tmp_path / "tiny_model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "tiny_model")
    task = {"kind": "gsm_symbolic", "num_prompts": 12, "few_shot": 0}
    overlay = {
        "models": [{"name": "tiny", "source": "local", "path": str(tmp_path / "tiny_model")}],
        "tasks": [task],
        "presses": [{"name": "knorm", "class": "KnormPress", "ratios": [0.5]}],
        "seed": 5,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(overlay))
    experiment = load_config(CHECKOUT / "config.yaml", path)
    prompts, _ = load_tasks(experiment.tasks, experiment.seed)
    splits = split_prompts(prompts_frame(prompts), experiment.splits, experiment.seed)
    schema.write_table(splits, tmp_path / "results/splits.parquet", schema.SPLITS)
    return (
        f"--press knorm --compression-ratio 0.9 --max-new-tokens 4 --policy none --config {path} "
        f"--results-dir {tmp_path}/results"
    )


def test_live_takes_test_prompts_and_other_ones_with_a_seed(
    tiny_run: str,
    tmp_path: Path,
    command: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    run_policy_shard = live.run_policy_shard

    def recorded(model: Any, prompts: Any, *arguments: Any, **options: Any) -> pl.DataFrame:
        asked[:] = [prompt.prompt_id for prompt in prompts]
        return run_policy_shard(model, prompts, *arguments, **options)

    monkeypatch.setattr(live, "run_policy_shard", recorded)
    splits = schema.read_table(tmp_path / "results/splits.parquet", schema.SPLITS)
    test = set(splits.filter(split="test")["prompt_id"])
    line = f"kvguard live {tiny_run} --num-prompts 2"
    done = command(line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "knorm 0.900, 2 prompts; hazard from rules" in done.stdout
    first = list(asked)
    assert len(first) == 2
    assert set(first) <= test
    done = command(f"{line} --seed 6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(asked) == 2
    assert not set(asked) & set(splits["prompt_id"]), "another seed draws other prompts"
    done = command(f"kvguard live {tiny_run} --num-prompts {len(test) + 1}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"has {len(test)} in its test split, got {len(test) + 1}" in done.stderr


def test_train_then_eval_controller(results: Path, tmp_path: Path) -> None:
    done = kvguard(f"kvguard train --results-dir {results} --num-prompts 24")
    assert done.returncode == 0, done.stderr
    model = results / "models/hazard_predictor.json"
    assert model.is_file()
    assert "auroc" in done.stdout
    before = model.stat().st_mtime_ns
    again = kvguard(f"kvguard train --results-dir {results} --num-prompts 24")
    assert "0 of the models' files are new or changed" in again.stdout
    assert model.stat().st_mtime_ns == before, "an equal model keeps its time: nothing reruns"

    done = kvguard(f"kvguard eval-controller --results-dir {results} --model-path {model}")
    assert done.returncode == 0, done.stderr
    for point in ("conservative", "balanced", "aggressive"):
        assert point in done.stdout


def test_eval_controller_decides_as_often_as_the_pipeline(
    results: Path, command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    simulate = evaluate_controller.simulate_controller

    def recorded(*arguments: Any, **options: Any) -> pl.DataFrame:
        asked.update(options)
        return simulate(*arguments, **options)

    monkeypatch.setattr(evaluate_controller, "simulate_controller", recorded)
    model = tmp_path / "rules.json"
    save_predictor(rules_predictor(), model)
    done = command(f"kvguard eval-controller --results-dir {results} --model-path {model}")
    assert done.returncode == 0, done.stderr
    guard = recorded_config(results).guard
    assert guard.check_every_tokens > 1, "the pipeline does not decide at every token"
    assert asked["check_every_tokens"] == guard.check_every_tokens


def test_calibrate_certifies_a_new_predictor(
    results: Path, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    predictor = folder / "other/hazard_predictor.json"
    predictor.parent.mkdir()
    save_predictor(rules_predictor(), predictor)
    line = f"kvguard calibrate --results-dir {folder} --model-path {predictor}"
    done = command(line)
    assert done.returncode == 0, done.stderr
    certificate = load_certificate(predictor.with_name("certificate.json"))
    certificate.check_predictor(rules_predictor())
    assert certificate.looks == 1
    assert not certificate.frozen_before_prompts
    assert "primary statements are certified" in done.stdout
    missing = command(f"kvguard calibrate --results-dir {tmp_path}  --config config.yaml")
    assert missing.returncode == 2
    assert "hazard_predictor.json" in missing.stderr


def test_training_on_fewer_prompts_leaves_the_runs_own_models(results: Path) -> None:
    done = kvguard(f"kvguard train --results-dir {results} --num-prompts 20")
    assert done.returncode == 0, done.stderr
    assert (results / "models_20_prompts/hazard_predictor.json").is_file()
    done = kvguard(f"kvguard train --results-dir {results} --num-prompts 25")
    assert done.returncode == 2
    assert "holds 24 prompts, got 25" in done.stderr


def test_training_on_too_few_prompts_is_refused(
    results: Path, command: Callable[..., Ended]
) -> None:
    done = command(f"kvguard train --results-dir {results} --num-prompts 2")
    assert done.returncode == 2
    assert re.search(r"--num-prompts: the first 2 prompts .* give at least \d+", done.stderr)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("analyze", "kvguard.duckdb"),
        ("eval-controller", "features.parquet"),
        ("eval-controller", "traces/tiny/snapkv/0.500/00.parquet"),
    ],
)
def test_a_damaged_file_is_named_with_its_cure(
    results: Path, tmp_path: Path, command: Callable[..., Ended], line: str, name: str
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    damaged = folder / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    save_predictor(rules_predictor(), folder / "models/hazard_predictor.json")
    done = command(f"kvguard {line} --results-dir {folder}")
    assert done.returncode == 2
    assert f"{name} is damaged" in done.stderr
    assert f"rm {damaged}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_stale_lock_is_named_with_the_command_that_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [CHECKOUT / "config.yaml"]
    assert stale_lock(layers, folder=tmp_path) is None
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.output.lock").write_text("results/x")
    message = stale_lock(layers, ["results_dir=elsewhere"], folder=tmp_path)
    assert message is not None
    command = shlex.split(message.splitlines()[-1])
    assert "--unlock" in command
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert stale_lock(layers, folder=tmp_path) is None


def test_analyze_prints_shares_with_intervals(results: Path, command: Callable[..., Ended]) -> None:
    done = command(f"kvguard analyze --results-dir {results}")
    assert done.returncode == 0, done.stderr
    outcomes = pl.read_parquet(results / "outcomes.parquet")
    compressed = outcomes.filter((pl.col("press") == "snapkv") & (pl.col("ratio") == "0.750"))
    share = compressed["catastrophe"].mean()
    assert "agreement" in done.stdout
    assert f"{share:.2f} [" in done.stdout
    done = command(f"kvguard analyze --results-dir {results} --view nonsense")
    assert done.returncode == 2
    assert "failure_kinds" in done.stderr


def test_analyze_writes_for_machines(results: Path, command: Callable[..., Ended]) -> None:
    done = command(f"kvguard analyze --results-dir {results} --limit 1 --format json")
    assert len(json.loads(done.stdout)) == 1
    done = command(f"kvguard analyze --results-dir {results} --format csv")
    rows = pl.read_csv(done.stdout.encode())
    assert {"press", "ratio", "agreement"} <= set(rows.columns)


def test_analyze_shows_what_policies_left_and_cost(
    tmp_path: Path, command: Callable[..., Ended]
) -> None:
    done = command(f"kvguard analyze --results-dir {tmp_path} --view policies")
    assert done.returncode == 2
    assert "policies.parquet" in done.stderr
    shares = {
        f"{name}{end}": [0.5, 0.0, 0.25]
        for name in ("harmed", "silent_harm", "rescued")
        for end in ("", "_low", "_high")
    }
    costs = ("tokens_prefilled", "checks", "seconds", "relative_byte_steps")
    table = pl.DataFrame(
        {
            "model": "m",
            "press": "snapkv",
            "ratio": "0.500",
            "policy": ["none", "always_safe", "guard"],
            "source": ["live", "live", "simulation"],
            "requests": 4,
            "device_bytes_peak": 3 * 2.0**20,
            **shares,
            **dict.fromkeys(costs, 1.0),
        }
    )
    schema.write_table(table, tmp_path / "tables" / "policies.parquet")
    done = command(f"kvguard analyze --results-dir {tmp_path} --view policies --format csv")
    rows = pl.read_csv(done.stdout.encode())
    assert rows["policy"].to_list() == ["full KV cache", "compression alone"], "least harm first"
    assert rows["harmed"].to_list() == [0.0, 0.5]
    assert rows["peak_mib"].to_list() == [3.0, 3.0]


def test_tables_split_where_the_terminal_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_tables, "console", Console(width=80))
    values = {f"a_rather_long_name_{index}": [index + 1000] for index in range(8)}
    cli_tables.print_frame(pl.DataFrame({"press": ["snapkv"], **values}), "wide")
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(f"{index + 1000:,}" in shown for index in range(8))
    assert shown.count("snapkv") == 3
    assert "…" not in shown


def test_answers_are_readable_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(num_prompts=6, shard_size=6, error_rate=0.3)
    keys = schema.TRACE_KEYS
    rows = run.traces.join(run.outcomes, on=keys, how="left").join(
        run.prompts.select("prompt_id", "reference"), on="prompt_id", how="left"
    )
    assert {"ok", "error"} == set(rows["status"])
    monkeypatch.setattr(cli_tables, "console", Console(width=80))
    cli_tables.print_answers(rows, "answers")
    shown = capsys.readouterr().out
    table = [line for line in shown.splitlines() if "│" in line or "┃" in line]
    assert all(len(line) <= 80 for line in table)
    assert "…" not in "".join(table)
    for row in rows.iter_rows(named=True):
        assert row["prompt_id"][:8] in shown
        assert (row["error"] or row["text"]).splitlines()[0] in shown
    failing = rows.filter(pl.col("looping").fill_null(value=False)).height
    assert sum("looping" in line for line in table) == failing


def test_verify_names_what_is_missing_and_fails(
    results: Path, command: Callable[..., Ended]
) -> None:
    done = command(f"kvguard verify --results-dir {results}")
    assert done.returncode == 1
    assert "predictions.parquet: no such file" in done.stdout
    assert "manifest.json" in done.stdout


@pytest.fixture(scope="module")
def moved_results(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run whose model and questions are not on this machine any more."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(results, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "models", ignore_errors=True)  # other tests train there
    gone = json.loads((folder / "config.json").read_text())
    weights = {"source": "gguf", "path": "/nowhere/model.gguf", "sha256": "0" * 64}
    gone["models"] = [{"name": "tiny", **weights}]
    gone["tasks"].append({"kind": "json_lines", "name": "mine", "path": "/nowhere/mine.jsonl"})
    gone["tasks"][-1]["num_prompts"] = 20
    (folder / "config.json").write_text(json.dumps(gone))
    return folder


@pytest.mark.parametrize("name", ["verify", "train", "calibrate", "eval-controller", "signals"])
def test_results_are_read_where_the_runs_model_is_gone(
    moved_results: Path, name: str, command: Callable[..., Ended]
) -> None:
    line = f"kvguard {name} --results-dir '{moved_results}'"
    done = command(line + (" --num-prompts 30" if name == "train" else ""))
    assert "no file at" not in done.stdout + done.stderr
    assert "cannot be used" not in done.stdout + done.stderr
    # What ends them is what this folder lacks, in the order in which they read it.
    lacks = {"verify": "manifest.json", "train": "holds 24 prompts, got 30"}
    lacks |= {"calibrate": "hazard_predictor.json", "eval-controller": "hazard_predictor.json"}
    assert lacks.get(name, "no ") in done.stdout + done.stderr


def test_status_reads_what_the_results_recorded(
    moved_results: Path, command: Callable[..., Ended]
) -> None:
    job = progress.PlannedJob("generate", {}, ["never_made"], [], "left")
    experiment = load_config(
        moved_results / "config.json",
        overrides={"results_dir": str(moved_results)},
        check_files=False,
    )
    progress.write_plan(moved_results, [job, job], progress.plan_digest(experiment))
    done = command(f"kvguard status --results-dir '{moved_results}'")
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert {row[1].strip(): row[3].strip() for row in rows} == {"generate": "2", "all": "2"}


def test_status_counts_jobs_per_stage(tmp_path: Path) -> None:
    done = kvguard("kvguard status --results-dir results/never_made")
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    table = {row[1].strip(): (row[2].strip(), row[3].strip()) for row in rows}
    config = load_config(CHECKOUT / "config.yaml")
    jobs = -(-len(config.conditions) * len(config.shards) // config.jobs.shards_per_job)
    assert table["generate"] == ("0", str(jobs))
    assert not any("block" in stage for stage in table)
    assert table["prepare_model"] == ("0", "1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kvguard run --press snapk", "did you mean snapkv"),
        ("kvguard run --press snapk", "snapkv or cap?"),
        ("kvguard run --press kvzip", "needs several passes"),
        ("kvguard run --press knorm --compression-ratio 1.0", "--compression-ratio"),
        ("kvguard run --press knorm --compression-ratio lots", "a number in [0, 1)"),
        ("kvguard run --press knorm --num-prompts 0", "--num-prompts"),
        ("kvguard run --press knorm --num-prompts -3", "--num-prompts"),
        ("kvguard run --press knorm --model gpt9", "no model 'gpt9'"),
        ("kvguard run --press knorm --config nowhere.yaml", "nowhere.yaml"),
        ("kvguard run --pres knorm", "--pres"),
        ("kvguard live --policy prayer", "got 'prayer'"),
        ("kvguard sweep --model owner/unheard-of --dry-run", "--revision"),
        ("kvguard sweep --model unheard-of --dry-run", "no model 'unheard-of'"),
        ("kvguard sweep --profile nonsense --dry-run", "default, gpu, slurm"),
        ("kvguard verify --results-dir nowhere", "nowhere"),
        ("kvguard analyze --results-dir nowhere", "nowhere/kvguard.duckdb"),
        ("kvguard train --results-dir nowhere", "nowhere"),
        ("kvguard eval-controller --results-dir nowhere", "nowhere"),
        ("kvguard findings --results-dir nowhere", "nowhere holds no run"),
    ],
)
def test_wrong_input_ends_with_one_message(
    line: str, message: str, command: Callable[..., Ended]
) -> None:
    done = command(line)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 15


def test_commands_work_in_any_folder(tmp_path: Path, command: Callable[..., Ended]) -> None:
    done = command("kvguard run --press knorm --model gpt9", cwd=tmp_path)
    assert done.returncode == 2
    assert "no model 'gpt9' in the configuration: smollm2-135m" in done.stderr
    done = command("kvguard sweep --config experiments/nowhere.yaml", cwd=tmp_path)
    assert "no configuration file at experiments/nowhere.yaml" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sweep_plans_in_any_folder(tmp_path: Path) -> None:
    share_code_digests(tmp_path)
    done = kvguard("kvguard sweep --dry-run --profile slurm --num-prompts 12", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results/sweeps/smollm2-135m-12/manifest.json" in done.stdout
    assert not (tmp_path / "results").exists()


def test_version_is_the_packages(command: Callable[..., Ended]) -> None:
    assert command("kvguard --version").stdout == f"kvguard {__version__}\n"


def test_what_is_not_installed_is_named_with_its_extra(
    results: Path, command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvguard.database", None)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    monkeypatch.delitem(sys.modules, "kvguard.database")
    done = command(f"kvguard analyze --results-dir {results}")
    assert done.returncode == 2
    assert "this needs duckdb" in done.stderr
    assert "kvguard[pipeline]" in done.stderr


@pytest.mark.parametrize(
    ("press", "ratio"),
    [
        ("snapkv", "0.5"),
        ("SnapKVPress", "0.5"),
        ("snapkv", "0.9"),
        ("expected_attention", "0.75"),
        ("streaming_llm", "0"),
    ],
)
def test_a_press_runs_at_any_ratio(press: str, ratio: str) -> None:
    experiment = press_experiment([CHECKOUT / "config.yaml"], press, ratio, num_prompts=2)
    assert experiment.presses[0].ratios == [f"{float(ratio) or 0.5:.3f}"]
    assert len(experiment.live_conditions) == 1


def test_a_mistyped_results_folder_downloads_nothing(
    tmp_path: Path, command: Callable[..., Ended]
) -> None:
    done = command("kvguard run --press knorm --num-prompts 1 --results-dir reslts", cwd=tmp_path)
    assert done.returncode == 2
    assert "--results-dir: no folder reslts" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_model_of_another_hash_is_refused(
    tmp_path: Path, command: Callable[..., Ended]
) -> None:
    spec = load_config(CHECKOUT / "config.yaml").models[0].model_dump(mode="json")
    prepared = tmp_path / "checkpoints" / spec["name"]
    prepared.mkdir(parents=True)
    record = {"spec": spec | {"wheel_sha256": "0" * 64}}
    (prepared / "kvguard_model.json").write_text(json.dumps(record))
    done = command(f"kvguard run --press knorm --num-prompts 1 --results-dir {tmp_path}")
    assert done.returncode == 2
    assert f"models.{spec['name']}.wheel_sha256" in done.stderr
    assert "Traceback" not in done.stderr


def test_press_names_are_classes_in_snake_case() -> None:
    assert snake_name("StreamingLLMPress") == "streaming_llm"
    assert snake_name("KnormPress") == "knorm"
    assert snake_name("ExpectedAttentionPress") == "expected_attention"
    for spelling in ("StreamingLLMPress", "streaming_llm", "StreamingLLM", "streaming-llm"):
        assert short_name(spelling) == "streamingllm"


def test_a_press_of_the_config_keeps_its_arguments() -> None:
    base = load_config(CHECKOUT / "config.yaml")
    assert press_entry(base, "snapkv")["kwargs"] == {"window_size": 16}
    assert press_entry(base, "SnapKVPress")["kwargs"] == {"window_size": 16}
    assert press_entry(base, "tova")["class"] == "TOVAPress"
    with pytest.raises(ConfigError, match="known: "):
        press_entry(base, "nothing_like_it")


def test_sweep_writes_its_overlay_into_its_own_folder(tmp_path: Path) -> None:
    for part in ("Snakefile", "rules", "workflow_scripts", "profiles", "envs", "reports"):
        source = CHECKOUT / part
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / part)
    shutil.copy2(CHECKOUT / "config.yaml", tmp_path / "config.yaml")
    share_code_digests(tmp_path)
    done = kvguard(
        "kvguard sweep --num-prompts 5 --target results/sweeps/smollm2-135m-5/splits.parquet "
        "--model smollm2-135m",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "results/sweeps/smollm2-135m-5"
    tasks = pl.read_parquet(made / "splits.parquet")["task"].value_counts()
    assert set(tasks["count"]) == {5}, "so many prompts of each task"
    assert "num_prompts: 5" in (made / "sweep.yaml").read_text()
