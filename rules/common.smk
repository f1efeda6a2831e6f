# Helpers of the rules: the checked configuration, wildcards, resources, digests of library code.
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from kvguard.config import BASELINE, ConfigError, parse_config
from kvguard.provenance import library_digest


def read_config(values):
    """The checked configuration; a wrong one ends Snakemake with the field and what it accepts."""
    try:
        return parse_config(values)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def any_of(names):
    """A regular expression that matches one of the names and nothing else."""
    return "|".join(re.escape(name) for name in sorted(set(names)))


def job(kind):
    """Resources of one kind of job, from the configuration's section `jobs`."""
    asked = getattr(experiment.jobs, kind)
    resources = {"mem_mb": asked.mem_mb, "runtime": asked.runtime, "gpu": asked.gpu}
    if asked.partition is not None:
        resources["slurm_partition"] = asked.partition
    if asked.account is not None:
        resources["slurm_account"] = asked.account
    return resources


def library(rule):
    """Digest of the kvguard code that a rule's script runs, so that a change of it reruns the rule."""
    return library_digest(Path(workflow.basedir) / "workflow_scripts" / f"{rule}.py")


def section(name):
    """One section of the configuration as plain built-ins, which Snakemake can compare."""
    return experiment.model_dump(mode="json", by_alias=True)[name]


def model_settings(wildcards, *names):
    """Fields of one model's entry; all of them when no names are given."""
    settings = experiment.model(wildcards.model).model_dump(mode="json")
    return {name: settings[name] for name in names} if names else settings


def model_files(wildcards):
    """Files outside the results that preparing a model reads."""
    model = experiment.model(wildcards.model)
    return [model.path / "config.json"] if model.source == "local" else []


def task_files():
    """Files outside the results that the task reads."""
    paths = [getattr(experiment.task, name, None) for name in ("test_path", "train_path")]
    return [path for path in paths if path is not None]


def press_settings(wildcards):
    """What decides how one press compresses, None for the baseline; its other ratios do not."""
    if wildcards.press == BASELINE:
        return None
    return experiment.press(wildcards.press).model_dump(
        mode="json", by_alias=True, exclude={"ratios"}
    )


def every_trace(pattern):
    """Paths of all (model, press, ratio, shard), in the order of the configuration."""
    return [
        path
        for model in experiment.models
        for press, ratio in experiment.conditions
        for path in collect(
            pattern,
            model=model.name,
            press=press,
            ratio=ratio,
            shard=[f"{shard:02d}" for shard in range(experiment.num_shards)],
        )
    ]
