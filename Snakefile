# Table of contents: configuration, rules by stage, targets.
#
#   snakemake --cores 2 --resources gpu=1                                    config.yaml
#   snakemake --configfile experiments/paper.yaml --workflow-profile profiles/slurm paper
import os

from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


if os.environ.get("KVGUARD_CONTAINER"):  # an image made from envs/Dockerfile, for --sdm apptainer

    containerized: os.environ.get("KVGUARD_CONTAINER")


include: "rules/common.smk"


experiment = read_config(config)


pathvars:
    results=experiment.results_dir,


wildcard_constraints:
    model=any_of(entry.name for entry in experiment.models),
    press=any_of(press for press, _ in experiment.all_conditions),
    ratio=any_of(ratio for _, ratio in experiment.all_conditions),
    policy=any_of([*experiment.live.policies, "guard_promote"]),  # constant is matched to it
    price=any_of(prices_tested()) or r"(?!)",
    shard=r"\d\d+",
    figure=any_of(FIGURES),


localrules:
    all,
    figures,
    freeze_plan,
    paper,
    record_run,
    render_report,
    signals,
    write_manifest,


onstart:
    record_plan()
    warn_of_unrecorded()


onsuccess:
    log_summary()


onerror:
    log_summary()


rule all:
    default_target: True
    input:
        "<results>/report.html",
        "<results>/findings.md",
        "<results>/manifest.json",


rule figures:
    input:
        collect("<results>/figures/{figure}.{suffix}", figure=run_figures(), suffix=["pdf", "png"]),


rule paper:
    input:
        rules.all.input,
        rules.figures.input,


rule signals:
    input:
        collect(
            "<results>/tables/signal_{table}.parquet",
            table=["scores", "tests", "policies", "pairs", "ladder", "transfer"],
        ),


include: "rules/prepare.smk"
include: "rules/generate.smk"
include: "rules/analyze.smk"
include: "rules/predict.smk"
include: "rules/import_models.smk"
include: "rules/control.smk"
include: "rules/live.smk"
include: "rules/blocks.smk"
include: "rules/publish.smk"
