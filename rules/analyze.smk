# From raw tokens to judged answers: outcomes, one DuckDB file, tables by condition.


rule find_harm_onsets:
    input:
        checkpoint="<results>/checkpoints/{model}",
        prompts="<results>/prompts/prompts.parquet",
        examples="<results>/prompts/few_shot.json",
        traces="<results>/traces/{model}/{press}/{ratio}/{shard}.parquet",
        tokens="<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet",
        baseline="<results>/traces/{model}/none/0.000/{shard}.parquet",
    output:
        onsets="<results>/harm_onsets/{model}/{press}/{ratio}/{shard}.parquet",
    log:
        "<results>/logs/find_harm_onsets/{model}/{press}/{ratio}/{shard}.log",
    benchmark:
        "<results>/benchmarks/find_harm_onsets/{model}/{press}/{ratio}/{shard}.tsv"
    wildcard_constraints:
        shard=single_shards(),
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.model.threads
    resources:
        **job("model"),
    params:
        model=lambda wildcards: model_settings(wildcards, "dtype", "device", "attention"),
        places=shard_places,
        experiment=lambda wildcards: part(
            "generation",
            "seed",
            detection=["rejection_margin_nats"],
            task=shard_places(wildcards)[-1],
        ),
        library=library("find_harm_onsets"),
    script:
        "../workflow_scripts/find_harm_onsets.py"


rule detect_outcomes:
    input:
        prompts="<results>/prompts/prompts.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        onsets=every_trace(
            "<results>/harm_onsets/{model}/{press}/{ratio}/{shard}.parquet",
            compressed=True,
        ),
    output:
        outcomes="<results>/outcomes.parquet",
    log:
        "<results>/logs/detect_outcomes.log",
    benchmark:
        "<results>/benchmarks/detect_outcomes.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        detection=section("detection"),
        library=library("detect_outcomes"),
    script:
        "../workflow_scripts/detect_outcomes.py"


rule build_database:
    input:
        prompts="<results>/prompts/prompts.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        outcomes="<results>/outcomes.parquet",
        splits="<results>/splits.parquet",
    output:
        database="<results>/kvguard.duckdb",
    log:
        "<results>/logs/build_database.log",
    benchmark:
        "<results>/benchmarks/build_database.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        library=library("build_database"),
    script:
        "../workflow_scripts/build_database.py"


rule summarize_conditions:
    input:
        database="<results>/kvguard.duckdb",
    output:
        condition_summary="<results>/tables/condition_summary.parquet",
        failure_kinds="<results>/tables/failure_kinds.parquet",
        harm="<results>/tables/harm.parquet",
        excess="<results>/tables/excess.parquet",
        compression_check="<results>/tables/compression_check.parquet",
        onsets="<results>/tables/onsets.parquet",
        errors="<results>/tables/errors.parquet",
    log:
        "<results>/logs/summarize_conditions.log",
    benchmark:
        "<results>/benchmarks/summarize_conditions.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        library=library("summarize_conditions"),
    script:
        "../workflow_scripts/summarize_conditions.py"


rule measure_sensitivity:
    input:
        prompts="<results>/prompts/prompts.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
    output:
        sensitivity="<results>/tables/sensitivity.parquet",
    log:
        "<results>/logs/measure_sensitivity.log",
    benchmark:
        "<results>/benchmarks/measure_sensitivity.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        detection=section("detection"),
        library=library("measure_sensitivity"),
    script:
        "../workflow_scripts/measure_sensitivity.py"
