# From raw tokens to judged answers: outcomes, one DuckDB file, tables by condition.


rule detect_outcomes:
    input:
        prompts="<results>/prompts/prompts.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
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
