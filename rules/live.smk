# Policies on the test prompts, through the engine; beside them the simulation of the same.


rule run_live:
    input:
        unpack(policy_files),
        checkpoint="<results>/checkpoints/{model}",
        prompts="<results>/prompts/prompts.parquet",
        examples="<results>/prompts/few_shot.json",
        splits="<results>/splits.parquet",
        outcomes="<results>/outcomes.parquet",
    output:
        runs="<results>/live/{model}/{press}/{ratio}/{policy}/{shard}.parquet",
    log:
        "<results>/logs/run_live/{model}/{press}/{ratio}/{policy}/{shard}.log",
    benchmark:
        "<results>/benchmarks/run_live/{model}/{press}/{ratio}/{policy}/{shard}.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.model.threads
    resources:
        **job("model"),
    params:
        model=lambda wildcards: model_settings(wildcards, "dtype", "device", "attention"),
        press=press_settings,
        places=live_places,
        experiment=lambda wildcards: part(
            "generation",
            "detection",
            "guard",
            "seed",
            live=live_settings(),
            task=live_places(wildcards)[0],
        ),
        library=library("run_live"),
    script:
        "../workflow_scripts/run_live.py"


rule summarize_live:
    input:
        live=every_live_run("<results>/live/{model}/{press}/{ratio}/{policy}/{shard}.parquet"),
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        simulation="<results>/simulation.parquet",
        outcomes="<results>/outcomes.parquet",
    output:
        policies="<results>/tables/policies.parquet",
        memory="<results>/tables/memory.parquet",
        differences="<results>/tables/simulation_differences.parquet",
        reasons="<results>/tables/simulation_reasons.parquet",
        tests="<results>/tables/policy_tests.parquet",
        policies_pooled="<results>/tables/policies_pooled.parquet",
        guard_tests="<results>/tables/guard_tests.parquet",
    log:
        "<results>/logs/summarize_live.log",
    benchmark:
        "<results>/benchmarks/summarize_live.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        bootstrap_samples=experiment.predictor.bootstrap_samples,
        seed=experiment.seed,
        library=library("summarize_live"),
    script:
        "../workflow_scripts/summarize_live.py"
