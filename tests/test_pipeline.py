"""The workflow: what reruns when, what stops before any job, profiles, logs, layout."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import CHECKOUT, CODE_DIGESTS, share_code_digests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_run import make_source

import kvguard
from kvguard.blocks import rule_of_block
from kvguard.code_digest import code_digest
from kvguard.config import load_config, overlay
from kvguard.figures import FIGURES
from kvguard.files import origin_of

PARTS = ("Snakefile", "rules", "workflow_scripts", "profiles", "envs", "reports", "kvguard")

PRESS = {
    "name": "snapkv",
    "class": "SnapKVPress",
    "kwargs": {"window_size": 16},
    "ratios": [0.5, 0.75],
}

TASK = {"kind": "gsm_symbolic", "num_prompts": 8}
SMALL = {
    "tasks": [TASK],
    "presses": [PRESS],
    "generation": {"shard_size": 4},
    "live": {"conditions": [], "policies": ["none", "guard_promote", "random"]},
    "jobs": {"shards_per_job": 1},
}

Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def run_snakemake(
    folder: Path, *arguments: str, check: bool = True, **config: object
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake on a copy of the checkout, with the library of that copy."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--nocolor", *arguments]
    if config:
        written = folder / "overlay.yaml"
        written.write_text(yaml.safe_dump(config))
        command += ["--configfile", str(written)]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def planned(folder: Path, *arguments: str, **config: object) -> dict[str, int]:
    """Jobs that Snakemake would run, by rule."""
    output = run_snakemake(folder, "--dry-run", *arguments, **config)
    text = output.stdout + output.stderr
    table = re.search(r"^Job stats:\njob .*\n-+ .*\n((?:\S+ +\d+\n)+)", text, re.MULTILINE)
    if table is None:
        assert "Nothing to be done" in text, text
        return {}
    counts = dict(line.split() for line in table[1].splitlines())
    return {
        rule: int(count)
        for rule, count in counts.items()
        if rule not in ("total", "all", "figures")
    }


def copy_checkout(target: Path) -> Path:
    """The workflow's own files, without results."""
    for part in PARTS:
        source = CHECKOUT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / part, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target / part)
    base = yaml.safe_load((CHECKOUT / "config.yaml").read_text())
    (target / "config.yaml").write_text(yaml.safe_dump(overlay(base, SMALL), sort_keys=False))
    share_code_digests(target)
    return target


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which every output is there and up to date; the files are empty."""
    folder = copy_checkout(tmp_path_factory.mktemp("finished"))
    summary = run_snakemake(folder, "--summary", "all", "figures").stdout
    for line in summary.splitlines()[1:]:
        path = folder / line.split("\t")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if "checkpoints" in path.parts:
            path.mkdir(exist_ok=True)
        else:
            path.touch()
    run_snakemake(folder, "--touch", "--forceall", "all", "figures")
    return folder


@pytest.fixture
def edited(finished: Path) -> Callable[..., Path]:
    """Replace a text in a file of the finished copy, as an editor does; taken back afterwards."""
    digests = finished / CODE_DIGESTS  # of the edited code, after a plan
    originals = {digests: digests.read_text()}

    def edit(name: str, old: str, new: str) -> Path:
        path = finished / name
        text = path.read_text()
        originals.setdefault(path, text)
        assert text.count(old) >= 1, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1))
        return finished

    yield edit  # type: ignore[misc]
    for path, text in originals.items():
        path.write_text(text)


def test_a_finished_run_has_nothing_to_do(finished: Path) -> None:
    assert planned(finished) == {}


def test_an_edited_figure_redraws_itself_alone(edited: Callable[..., Path]) -> None:
    folder = edited(
        "kvguard/plot_failures.py", '"excess_cfr": "catastrophes"', '"excess_cfr": "failures"'
    )
    jobs = planned(folder, "all", "figures")
    assert jobs == {"draw_figure": 1, "render_report": 1, "write_manifest": 1}
    assert planned(folder, "results/figures/excess.png") == {"draw_figure": 1}


def test_a_new_look_redraws_every_figure_and_nothing_upstream(
    edited: Callable[..., Path],
) -> None:
    folder = edited("kvguard/data/kvguard.mplstyle", "font.size: 8", "font.size: 9")
    jobs = planned(folder, "all", "figures")
    figures = len(FIGURES) - 1  # without harm against the price, which this run has not certified
    assert jobs == {"draw_figure": figures, "render_report": 1, "write_manifest": 1}


PUBLISHED = {"export_tables", "write_findings", "write_manifest", "render_report", "draw_figure"}
"""Rules that show what others computed, after any change of a table."""


def test_a_run_with_another_one_s_models_plans_no_training(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    make_source(folder / "results/source", presses=[PRESS], tasks=[TASK | {"num_prompts": 12}])
    over = {
        "seed": 2,
        "results_dir": "results/own",
        "predictor": {"trained_by": "results/source"},
        "splits": {"train": 0, "calibration": 0.5, "test": 0.5},
        "live": {"policies": ["none", "guard_price", "always_safe", "offload"]},
        "jobs": {"shards_per_job": 1},
    }
    jobs = planned(folder, "all", "figures", **over)
    assert jobs["import_models"] == 1
    assert jobs["generate"] == 2, "two shards of the baseline"
    assert jobs["run_live"] == 2 * 4, "two ratios, four policies"
    trained = {"train_predictor", "label_traces", "build_features", "calibrate_controller"}
    fitted = {"fit_rivals", "fit_harm_model", "simulate_controller", "find_harm_onsets"}
    assert not jobs.keys() & (trained | fitted | {"ablate_features", "render_viewer"})


def test_a_run_that_cannot_give_its_models_stops_before_any_job(tmp_path: Path) -> None:
    over = {"results_dir": "results/own", "predictor": {"trained_by": "results/source"}}
    over |= {"live": {"policies": ["none"]}}
    done = run_snakemake(copy_checkout(tmp_path), "--dry-run", check=False, **over)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "predictor.trained_by: should name results of a finished run" in said


def test_a_docstring_reruns_nothing(edited: Callable[..., Path]) -> None:
    edited("kvguard/signals.py", '"""', '"""Another first sentence. ')
    edited("kvguard/engine.py", "    Args:", "    The arguments:\n\n    Args:")
    folder = edited("workflow_scripts/generate.py", '"""', '"""Another first sentence. ')
    assert planned(folder, "all", "figures") == {}


def test_a_comment_reruns_nothing(edited: Callable[..., Path]) -> None:
    assert planned(edited("kvguard/signals.py", "import torch\n", "import torch  # nats\n")) == {}


def test_a_message_about_a_download_reruns_nothing(edited: Callable[..., Path]) -> None:
    edited("kvguard/checkpoints.py", "could not be fetched from the ", "did not come from the ")
    folder = edited("kvguard/checkpoints.py", '"downloading %s"', '"fetching %s"')
    assert planned(folder, "all", "figures") == {}


def head(name: str, function: str) -> str:
    """The source of a function up to the end of its docstring."""
    text = (CHECKOUT / name).read_text()
    found = re.search(rf'^def {function}\(.*?"""\n(?=    \S)', text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{name} has no {function}"
    return found[0]


def test_an_edited_summary_makes_the_summary_again(edited: Callable[..., Path]) -> None:
    start = head("kvguard/compare_policies.py", "summarize_differences")
    folder = edited("kvguard/compare_policies.py", start, start + "    rounding = 3\n")
    jobs = planned(folder, "all", "figures")
    assert jobs["summarize_live"] == 1
    assert set(jobs) <= {"summarize_live", *PUBLISHED}


def test_an_edited_signal_generates_again(edited: Callable[..., Path]) -> None:
    jobs = planned(edited("kvguard/signals.py", "_CHUNK = ", "_CHUNK = 2 * "))
    assert jobs["generate"] == 3 * 2, "the baseline and two ratios, two shards each"
    assert jobs["run_live"] == 2 * 3, "two ratios, three policies"
    assert "prepare_model" not in jobs
    assert "prepare_prompts" not in jobs


def test_an_edited_script_reruns_its_rule(edited: Callable[..., Path]) -> None:
    folder = edited(
        "workflow_scripts/export_tables.py",
        "write_csv(temporary)",
        "write_csv(temporary, separator=';')",
    )
    assert planned(folder, "all") == {"export_tables": 1, "render_report": 1, "write_manifest": 1}


def test_one_press_parameter_reruns_that_press_alone(finished: Path) -> None:
    knorm = {"name": "knorm", "class": "KnormPress", "ratios": [0.3]}
    changed = dict(PRESS, kwargs={"window_size": 24})
    target = "results/outcomes.parquet"
    jobs = planned(finished, target, **SMALL | {"presses": [PRESS, knorm]})
    assert jobs["generate"] == 2, "two shards of the new press"
    jobs = planned(finished, target, **SMALL | {"presses": [changed]})
    assert jobs["generate"] == 2 * 2, "two ratios, two shards; not the baseline"
    more = dict(PRESS, ratios=[0.5, 0.75, 0.875])
    jobs = planned(finished, target, **SMALL | {"presses": [more]})
    assert jobs["generate"] == 2, "two shards of the new ratio"


def test_results_without_records_that_another_configuration_made_are_named(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    run_snakemake(folder, "results/config.json")
    shutil.rmtree(folder / ".snakemake" / "metadata")
    done = run_snakemake(folder, "results/config.json", "results/models/plan.txt", seed=1)
    told = re.search(r"record_run: 2 files were made by other parameters or code.*", done.stderr)
    assert told is not None, done.stderr
    assert "--forcerun record_run" in told[0]


def test_blocks_cover_every_shard_and_a_matched_rival_waits_for_the_guard(tmp_path: Path) -> None:
    live = SMALL["live"] | {"policies": ["none", "constant"]}
    jobs = planned(copy_checkout(tmp_path), "all", live=live, jobs={"shards_per_job": 4})
    blocks = Counter(rule_of_block(rule) for rule in jobs if "_block_" in rule)
    assert blocks["generate"] == 2, "six shards: the baseline and two ratios, two shards each"
    assert blocks["find_harm_onsets"] == 1
    assert blocks["run_live"] == 2, "none and guard_promote under two ratios; constant after them"
    assert not {"generate", "find_harm_onsets", "run_live"} & set(jobs)


def test_prices_are_certified_on_prompts_of_their_own(tmp_path: Path) -> None:
    live = {"policies": ["none", "guard_price"], "certify_prices": [100, 30], "conditions": []}
    live |= {"harm_price": "certified"}
    folder, guard = copy_checkout(tmp_path), {"bus_ratio": 50}
    jobs = planned(folder, "all", live=live, guard=guard)
    assert jobs["run_certifying"] == 4, "two ratios, two prices, one shard"
    assert jobs["certify_price"] == 1
    assert jobs["draw_figure"] == len(FIGURES), "harm against the price, too"
    where = "results/live/smollm2-135m/snapkv/0.500"
    needed = planned(folder, f"{where}/guard_price/00.parquet", live=live, guard=guard)
    assert needed["certify_price"] == needed["run_live"] == 1
    alone = planned(folder, f"{where}/none/00.parquet", live=live, guard=guard)
    assert "certify_price" not in alone


def test_a_plan_by_lists_sees_a_lost_shard_and_makes_its_block_alone(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    live = SMALL["live"] | {"policies": ["none", "constant"]}
    config: dict[str, object] = {"live": live, "jobs": {"shards_per_job": 2, "list_shards": True}}
    summary = run_snakemake(folder, "--summary", "all", "figures", **config).stdout
    outputs = [line.split("\t")[0] for line in summary.splitlines()[1:]]
    kinds = Counter(Path(path).parts[2] for path in outputs if "/lists/" in path)
    assert kinds == {"traces": 3, "tokens": 3, "harm_onsets": 2, "live": 5}
    experiment = load_config(folder / "config.yaml", folder / "overlay.yaml")
    shards = [
        f"results/{table}/{model.name}/{press}/{ratio}/{shard:02d}.parquet"
        for table in ("traces", "tokens", "harm_onsets")
        for model in experiment.models
        for press, ratio in experiment.conditions
        for shard in range(len(experiment.shards))
    ]
    shards += [
        f"results/live/{model.name}/{press}/{ratio}/{policy}/00.parquet"
        for model in experiment.models
        for press, ratio in experiment.live_conditions
        for policy in ("none", "guard_promote", "constant")
    ]
    for path in (folder / name for name in [*outputs, *shards]):
        path.parent.mkdir(parents=True, exist_ok=True)
        if "checkpoints" in path.parts:
            path.mkdir(exist_ok=True)
        else:
            path.touch()
    run_snakemake(folder, "--touch", "--forceall", "all", "figures", **config)
    assert planned(folder, "all", **config) == {}
    lost = "tokens/smollm2-135m/snapkv/0.750/01.parquet"
    (folder / "results" / lost).unlink()
    jobs = planned(folder, "all", **config)
    assert jobs["generate_block_each"] == 1
    assert {"detect_outcomes", "write_manifest"} <= set(jobs)
    assert not {"prepare_model", "prepare_prompts"} & set(jobs)


def test_detection_parameters_rerun_no_model_for_generation(finished: Path) -> None:
    jobs = planned(finished, detection={"loop_repeats": 4})
    assert "generate" not in jobs
    assert jobs["detect_outcomes"] == 1
    assert jobs["build_database"] == 1


def test_figure_only_settings_do_not_reach_training(finished: Path) -> None:
    jobs = planned(finished, live={"operating_point": "aggressive"})
    assert not {"generate", "train_predictor", "calibrate_controller"} & set(jobs)


def test_results_dir_moves_every_output(finished: Path) -> None:
    output = run_snakemake(finished, "--summary", "all", "figures", results_dir="elsewhere/run1")
    paths = [line.split("\t")[0] for line in output.stdout.splitlines()[1:]]
    assert len(paths) > 60
    assert all(path.startswith("elsewhere/run1/") for path in paths)


def test_a_missing_shard_is_the_only_generation(finished: Path) -> None:
    missing = ("tokens/smollm2-135m/snapkv/0.750/01.parquet", "outcomes.parquet")
    moved = {finished / "results" / name: finished / f"{Path(name).stem}.aside" for name in missing}
    for path, aside in moved.items():
        path.rename(aside)
    try:
        jobs = planned(finished, "results/outcomes.parquet")
    finally:
        for path, aside in moved.items():
            aside.rename(path)
    assert jobs["generate"] == 1
    assert jobs["detect_outcomes"] == 1
    assert not {"prepare_model", "prepare_prompts"} & set(jobs)


@pytest.mark.parametrize(
    ("config", "field", "accepted"),
    [
        (
            {"presses": [{"name": "x", "class": "SnapPress", "ratios": [0.5]}]},
            "presses.0.class",
            "SnapKVPress",
        ),
        (
            {"presses": [{"name": "x", "class": "KnormPress", "ratios": [1.0]}]},
            "presses.0.ratios.0",
            "[0, 1)",
        ),
        ({"tasks": [TASK | {"num_prompts": -3}]}, "tasks.0.num_prompts", "greater than or equal"),
        ({"generation": {"max_new_token": 5}}, "generation.max_new_token", "unknown key"),
        ({"tasks": [TASK | {"num_prompts": 2}]}, "2 prompts cannot fill", "at least"),
        (
            {
                "tasks": [
                    {
                        "kind": "gsm8k",
                        "num_prompts": 8,
                        "test_path": "nowhere.jsonl",
                        "train_path": "nowhere.jsonl",
                    }
                ]
            },
            "test_path",
            "no file at nowhere.jsonl",
        ),
    ],
)
def test_a_wrong_configuration_stops_before_any_job(
    finished: Path, config: dict[str, object], field: str, accepted: str
) -> None:
    done = run_snakemake(finished, check=False, **config)
    text = done.stdout + done.stderr
    assert done.returncode == 1
    assert field in text
    assert accepted in text
    assert "Traceback" not in text
    assert "Job stats" not in text


@pytest.mark.parametrize("profile", ["default", "gpu", "slurm"])
def test_profiles_plan_the_whole_run(tmp_path: Path, profile: str) -> None:
    folder = copy_checkout(tmp_path)
    jobs = planned(folder, "--workflow-profile", f"profiles/{profile}", "all", "figures")
    assert jobs["generate"] == 6
    assert jobs["render_report"] == 1


def test_every_table_between_generation_and_report_is_in_a_group_of_the_cluster() -> None:
    text = "".join(path.read_text() for path in [*CHECKOUT.glob("rules/*.smk")])
    rules = set(re.findall(r"^ *rule (\w+):", text, re.MULTILINE))
    snakefile = (CHECKOUT / "Snakefile").read_text()
    local = re.search(r"localrules:\n((?:    \w+,\n)+)", snakefile)
    assert local is not None
    alone = {"prepare_model", "prepare_prompts", "generate", "find_harm_onsets", "run_live"}
    alone |= {"run_certifying", "certify_price"}  # between jobs of the model
    alone |= {"import_models"}  # may refuse before anything is generated
    alone |= set(local[1].replace(",", "").split())
    profile = yaml.safe_load((CHECKOUT / "profiles/slurm/config.yaml").read_text())
    grouped = [entry.split("=")[0] for entry in profile["groups"]]
    # One outside a group that stands between two of its jobs stops the whole plan.
    assert sorted(grouped) == sorted(rules - alone - {"study_signals"})


@pytest.mark.parametrize("profile", ["default", "gpu", "slurm"])
def test_a_changed_script_reruns_its_rule_under_every_profile(
    edited: Callable[..., Path], profile: str
) -> None:
    folder = edited(
        "workflow_scripts/generate.py", "write_table(", "print('a shard')\n    write_table("
    )
    jobs = planned(folder, "--workflow-profile", f"profiles/{profile}")
    assert jobs["generate"] == 6
    assert "prepare_model" not in jobs


def test_slurm_resources_come_from_the_configuration(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    job = {"partition": "gpu", "account": "lab", "gpu": 1, "runtime": 77, "mem_mb": 5000}
    target = "results/tokens/smollm2-135m/snapkv/0.750/01.parquet"
    done = run_snakemake(
        folder,
        *("--workflow-profile", "profiles/slurm", "--dry-run", target),
        jobs={"model": job},
    )
    generate = done.stdout[done.stdout.index("rule generate:") :]
    asked = re.search(r"resources: (.*)", generate)
    assert asked is not None
    for part in ("slurm_partition=gpu", "slurm_account=lab", "gpu=1", "runtime=77", "mem_mb=5000"):
        assert part in asked[1]


def test_the_paper_experiment_plans_16_configurations_per_model(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    shutil.copytree(CHECKOUT / "experiments", folder / "experiments")
    shutil.copy2(CHECKOUT / "config.yaml", folder / "config.yaml")
    done = run_snakemake(
        folder, "--dry-run", "--configfile", "experiments/paper.yaml", "--", "paper"
    )
    traces = set(re.findall(r"results/paper/traces/([\w.-]+/[\w.-]+/[\d.]+)/", done.stdout))
    assert len(traces) == 2 * 16


def test_a_failing_job_leaves_its_traceback_and_no_output(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    script = folder / "workflow_scripts/record_run.py"
    script.write_text(script.read_text().replace("describe_run(config)", "1 // 0"))
    done = run_snakemake(folder, "results/provenance.json", check=False)
    assert done.returncode == 1
    log = (folder / "results/logs/record_run.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError" in log
    assert not (folder / "results/provenance.json").exists()


def test_a_failing_import_leaves_its_traceback_too(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    module = folder / "kvguard/schema.py"
    module.write_text(module.read_text() + "\n\nimport no_such_package\n")
    log = folder / "log.txt"
    probe = (
        "import sys, types; main = sys.modules['__main__']\n"
        f"main.snakemake = types.SimpleNamespace(log=[{str(log)!r}])\n"
        "from kvguard import joblog\nfrom kvguard import schema\n"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 1
    assert "no_such_package" in log.read_text()


def test_a_run_records_its_configuration_and_its_versions(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    run_snakemake(folder, "results/config.json")
    recorded = load_config(folder / "results/config.json")
    assert recorded == load_config(folder / "config.yaml")
    provenance = json.loads((folder / "results/provenance.json").read_text())
    assert provenance["packages"]["kvpress"] == metadata.version("kvpress")
    assert None not in provenance["packages"].values()
    assert provenance["cores"] == os.cpu_count()
    origin = origin_of(folder / "results/provenance.json")
    assert origin["rule"] == "record_run"
    assert origin["seed"] == recorded.seed
    assert origin["packages"] == provenance["packages"]
    assert origin["device"] == "cpu"


def test_prompts_say_what_made_them(tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path)
    prompts = "results/prompts/prompts.parquet"
    run_snakemake(folder, prompts)
    first = origin_of(folder / prompts)
    assert first["code"] == code_digest(folder / "workflow_scripts/prepare_prompts.py")
    assert first["kvguard"] == kvguard.__version__
    run_snakemake(folder, prompts, seed=5)
    second = origin_of(folder / prompts)
    assert second["seed"] == 5
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"seed", "configuration", "parameters", "values"}


# --- layout and style ----------------------------------------------------------------------------


def scripts() -> list[str]:
    return sorted(path.stem for path in (CHECKOUT / "workflow_scripts").glob("*.py"))


def rules() -> dict[str, str]:
    """Text of every rule with a script, by name."""
    text = "".join(path.read_text() for path in sorted((CHECKOUT / "rules").glob("*.smk")))
    found = re.findall(r"^rule (\w+):\n((?:(?:    .*)?\n)+)", text, re.MULTILINE)
    return dict(found)


def test_every_rule_has_a_script_a_log_and_all_it_should_state() -> None:
    assert sorted(rules()) == scripts()
    for name, text in rules().items():
        cached = "    cache:" in text  # Snakemake allows such a rule no benchmark
        measured = () if cached else ("benchmark:",)
        for part in ("output:", "log:", *measured, "threads:", "resources:", "params:"):
            assert f"    {part}" in text, (name, part)
        assert f'"../workflow_scripts/{name}.py"' in text
        assert f'"<results>/logs/{name}' in text
        assert cached or f'"<results>/benchmarks/{name}' in text
        assert "../envs/kvguard.yaml" in text
        if name != "record_run":
            digest = f'library=library("{name}")'
            assert digest in text or "library=lambda wildcards: figure_digest" in text, name


@pytest.mark.parametrize("script", scripts())
def test_scripts_are_short_and_import_without_snakemake(script: str) -> None:
    text = (CHECKOUT / "workflow_scripts" / f"{script}.py").read_text()
    assert len(text.splitlines()) <= 64
    assert 'if __name__ == "__main__":' in text


def test_linters_are_content() -> None:
    assert run_snakemake(CHECKOUT, "--lint").returncode == 0
    command = [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "rules"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pins_agree_everywhere() -> None:
    spec = importlib.util.spec_from_file_location("write_envs", CHECKOUT / "envs/write_envs.py")
    assert spec is not None
    assert spec.loader is not None
    write_envs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_envs)
    assert (CHECKOUT / "envs/kvguard.yaml").read_text() == write_envs.environment()
    constraints = dict(
        line.split("==") for line in (CHECKOUT / "constraints.txt").read_text().splitlines()
    )
    assert all(re.fullmatch(r"[\w.]+", version) for version in constraints.values())
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {canonicalize_name(name): version for name, version in constraints.items()}
    for entry in [*project["dependencies"], *(e for extra in extras.values() for e in extra)]:
        wanted = Requirement(entry)
        assert "==" not in str(wanted.specifier), f"{entry}: exact pins live in constraints.txt"
        if wanted.name != "kvguard":
            pin = pinned[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(pin, prereleases=True), (entry, pin)


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "help"], cwd=CHECKOUT, capture_output=True, text=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    wanted = "demo test check fmt lint typecheck figures phase2 status bench clean help"
    assert set(wanted.split()) <= listed
