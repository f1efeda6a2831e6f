# Answers under every press and ratio, with signals and audit: the jobs that need the model.


rule generate:
    input:
        checkpoint="<results>/checkpoints/{model}",
        prompts="<results>/prompts/prompts.parquet",
        examples="<results>/prompts/few_shot.json",
    output:
        traces="<results>/traces/{model}/{press}/{ratio}/{shard}.parquet",
        tokens="<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet",
    log:
        "<results>/logs/generate/{model}/{press}/{ratio}/{shard}.log",
    benchmark:
        "<results>/benchmarks/generate/{model}/{press}/{ratio}/{shard}.tsv"
    wildcard_constraints:
        shard=single_shards(),
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.model.threads
    resources:
        **job("model"),
    params:
        model=lambda wildcards: model_settings(wildcards, "dtype", "device", "attention"),
        press=press_settings,
        places=shard_places,
        experiment=lambda wildcards: part("generation", "seed", task=shard_places(wildcards)[-1]),
        library=library("generate"),
    script:
        "../workflow_scripts/generate.py"
