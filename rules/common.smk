# Helpers of the rules: the checked configuration, wildcards, resources, digests of library code.
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from kvguard.code_digest import code_digest, data_digest, definition_digest
from kvguard.config import BASELINE, POLICIES, ConfigError, digest, parse_config
from kvguard.figures import FIGURES
from kvguard.splits import check_split_sizes
from kvguard.workflow import certificate_uses


def read_config(values):
    """The checked configuration; a wrong one ends Snakemake with the field and what it accepts."""
    try:
        checked = parse_config(values)
        for task in checked.tasks:
            check_split_sizes(task.name, task.num_prompts, checked.splits)
    except (ConfigError, ValueError) as error:
        raise WorkflowError(str(error)) from None
    return checked


def any_of(names):
    """A regular expression that matches one of the names and nothing else."""
    return "|".join(re.escape(name) for name in sorted(set(names)))


def job(kind):
    """Resources of one kind of job, from the configuration's section `jobs`.

    A job that is retried asks for its memory and its minutes once more with every attempt.
    """
    asked = getattr(experiment.jobs, kind)
    resources = {
        "mem_mb": lambda wildcards, attempt: asked.mem_mb * attempt,
        "runtime": lambda wildcards, attempt: asked.runtime * attempt,
        "gpu": asked.gpu,
    }
    if asked.partition is not None:
        resources["slurm_partition"] = asked.partition
    if asked.account is not None:
        resources["slurm_account"] = asked.account
    return resources


def library(rule, only=None):
    """Digest of a rule's script and of the kvguard code that it reaches: a change reruns the rule.

    `only` maps a dict literal of the library, "module.NAME", to the one entry that the job reads.
    """
    return code_digest(Path(workflow.basedir) / "workflow_scripts" / f"{rule}.py", only)


def section(name):
    """One section of the configuration as plain built-ins, which Snakemake can compare."""
    return experiment.model_dump(mode="json", by_alias=True)[name]


def part(*names, task=None, **fields):
    """Sections of the configuration for `config.config_part`: what a script reads, no more.

    `fields` are sections of which only some fields count, `task` names the one task that does.
    """
    values = experiment.model_dump(mode="json", by_alias=True)
    chosen = {name: values[name] for name in names}
    for name, kept in fields.items():
        chosen[name] = {field: values[name][field] for field in kept}
    if task is not None:
        chosen["tasks"] = [entry for entry in values["tasks"] if entry["name"] == task]
    return chosen


def shard_places(wildcards):
    """First and last place, and task, of the prompts that one shard holds."""
    places, first = experiment.shards[int(wildcards.shard)], 0
    for task in experiment.tasks:
        first += task.num_prompts
        if places.start < first:
            return [places.start, places.stop, task.name]


def live_places(wildcards):
    """Task, part and number of parts of the test prompts that one live shard holds."""
    return list(experiment.live_shards[int(wildcards.shard)])


def model_settings(wildcards, *names):
    """Fields of one model's entry; all of them when no names are given."""
    settings = experiment.model(wildcards.model).model_dump(mode="json")
    return {name: settings[name] for name in names} if names else settings


def model_files(wildcards):
    """Files outside the results that preparing a model reads."""
    model = experiment.model(wildcards.model)
    if model.source == "gguf":
        return [model.path]
    return [model.path / "config.json"] if model.source == "local" else []


def task_files():
    """Files outside the results that the tasks read."""
    return [path for task in experiment.tasks for path in task.files]


def press_settings(wildcards):
    """What decides how one press compresses, None for the baseline; its other ratios do not."""
    if wildcards.press == BASELINE:
        return None
    return experiment.press(wildcards.press).model_dump(
        mode="json", by_alias=True, exclude={"ratios", "live_ratios"}
    ) | {"ratios": [wildcards.ratio]}


def every_trace(pattern, compressed=False):
    """Paths of all (model, press, ratio, shard), in the order of the configuration.

    ``compressed`` leaves out the uncompressed baseline.
    """
    return [
        path
        for model in experiment.models
        for press, ratio in experiment.conditions
        if not (compressed and press == BASELINE)
        for path in collect(
            pattern,
            model=model.name,
            press=press,
            ratio=ratio,
            shard=[f"{shard:02d}" for shard in range(len(experiment.shards))],
        )
    ]


def live_conditions():
    """(press, ratio) pairs of the live experiment: those listed, or all but the baseline."""
    return experiment.live_conditions


def every_live_run(pattern):
    """Paths of all (model, press, ratio, policy, shard) of the live experiment."""
    shards = len(experiment.live_shards)
    return [
        path
        for press, ratio in live_conditions()
        for path in collect(
            pattern,
            model=[model.name for model in experiment.models],
            press=press,
            ratio=ratio,
            policy=experiment.live.policies,
            shard=[f"{shard:02d}" for shard in range(shards)],
        )
    ]


def policy_files(wildcards):
    """What a policy needs beyond the model: a guard its predictor, a matched rival what it matches."""
    files = {}
    if POLICIES[wildcards.policy].needs_hazard:
        files["predictor"] = "<results>/models/hazard_predictor.json"
        files["certificate"] = "<results>/models/certificate.json"
    if wildcards.policy in ("random", "constant"):
        files["simulation"] = "<results>/simulation.parquet"
    if wildcards.policy in ("clock_or_loop", "gate"):
        files["rivals"] = "<results>/models/rivals.json"
    if wildcards.policy == "gate":
        files["baselines"] = "<results>/models/baselines.json"
    return files


def certificate_plan():
    """Digest of what the certificate depends on but the prompts: configuration and code."""
    sections = (
        *("models", "tasks", "presses", "generation", "detection", "labels", "splits"),
        *("predictor", "guard", "controller", "certificate", "seed"),
    )
    rules = ("train_predictor", "build_features", "detect_outcomes", "calibrate_controller")
    plan = {name: section(name) for name in sections}
    return digest(plan | {"code": [library(rule) for rule in rules]})


def live_settings():
    """Fields of the live experiment's section, without what only decides which jobs there are."""
    return [
        name for name in section("live") if name not in ("policies", "conditions", "shard_size")
    ]


def figure_files(wildcards):
    """The tables that a figure shows, and the certificate where it names operating points."""
    entry = FIGURES[wildcards.figure]
    files = {
        table: f"<results>/{'' if table in LARGE_TABLES else 'tables/'}{table}.parquet"
        for table in entry.tables
    }
    if any(argument.startswith("operating_point") for argument in entry.arguments):
        files["certificate"] = "<results>/models/certificate.json"
    return files


def figure_digest(name):
    """Digest of the code that draws one figure, of its entry in the registry and of the plot style."""
    entry = FIGURES[name]
    return [
        library("draw_figure", {"figures.FIGURES": name}),
        definition_digest(entry.module, entry.function),
        data_digest("kvguard.mplstyle"),
    ]


def captions():
    """Texts beside the report's figures and tables."""
    return sorted((Path(workflow.basedir) / "reports" / "captions").glob("*.rst"))


def every_table(suffix):
    """Paths of all tables that the run's rules write."""
    return [f"<results>/tables/{name}.{suffix}" for name in TABLES]


def table_report(name):
    """A table's CSV as an entry of the report."""
    return report(
        f"<results>/tables/{name}.csv",
        caption="../reports/captions/table.rst",
        category="Tables",
        subcategory=TABLES[name],
        labels={"table": name.replace("_", " ")},
    )


LARGE_TABLES = ("timeline", "outcomes", "simulation", "predictions", "splits")
"""Tables that lie in the results folder itself."""

TABLES = {
    "condition_summary": "Failures",
    "failure_kinds": "Failures",
    "harm": "Failures",
    "excess": "Failures",
    "onsets": "Failures",
    "sensitivity": "Failures",
    "errors": "Failures",
    "compression_check": "Failures",
    "training": "Predictor",
    "search_trials": "Predictor",
    "harm_metrics": "Predictor",
    "predictor_metrics": "Predictor",
    "predictor_curves": "Predictor",
    "lead_times": "Predictor",
    "detection": "Predictor",
    "ablation": "Predictor",
    "feature_importance": "Predictor",
    "formulation": "Predictor",
    "controls": "Predictor",
    "leave_one_out": "Predictor",
    "transfer": "Predictor",
    "certificate": "Controller",
    "certificate_grid": "Controller",
    "operating_points": "Controller",
    "pareto": "Controller",
    "simulability": "Controller",
    "policies": "Live",
    "policies_pooled": "Live",
    "policy_tests": "Live",
    "guard_tests": "Live",
    "simulation_reasons": "Live",
    "memory": "Live",
    "leakage_check": "Checks",
    "leakage_check_evaluation": "Checks",
    "leakage_check_ablation": "Checks",
    "leakage_check_leave_one_out": "Checks",
    "leakage_check_calibration": "Checks",
}
"""Tables and their place in the report; all hold plain columns and are written as CSV too."""
