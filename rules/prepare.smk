# What the experiment starts from: its description, its models, its prompts.


rule record_run:
    output:
        config="<results>/config.json",
        provenance="<results>/provenance.json",
    log:
        "<results>/logs/record_run.log",
    benchmark:
        "<results>/benchmarks/record_run.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        config=experiment.model_dump(mode="json", by_alias=True, exclude={"jobs"}),
    script:
        "../workflow_scripts/record_run.py"


rule prepare_model:
    input:
        source=model_files,
    output:
        checkpoint=directory("<results>/checkpoints/{model}"),
    log:
        "<results>/logs/prepare_model/{model}.log",
    cache: "omit-software"  # which Snakemake allows to no rule with a benchmark
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.model.threads
    resources:
        **job("model"),
    params:
        model=model_settings,
        library=library("prepare_model"),
    script:
        "../workflow_scripts/prepare_model.py"


rule prepare_prompts:
    input:
        source=task_files(),
    output:
        prompts="<results>/prompts/prompts.parquet",
        examples="<results>/prompts/few_shot.json",
    log:
        "<results>/logs/prepare_prompts.log",
    benchmark:
        "<results>/benchmarks/prepare_prompts.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        tasks=section("tasks"),
        seed=experiment.seed,
        library=library("prepare_prompts"),
    script:
        "../workflow_scripts/prepare_prompts.py"
