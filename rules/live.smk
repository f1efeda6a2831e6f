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
        simulation=trained("<results>/simulation.parquet"),
        outcomes="<results>/outcomes.parquet",
    output:
        policies="<results>/tables/policies.parquet",
        memory="<results>/tables/memory.parquet",
        differences="<results>/tables/simulation_differences.parquet",
        reasons="<results>/tables/simulation_reasons.parquet",
        tests="<results>/tables/policy_tests.parquet",
        policies_pooled="<results>/tables/policies_pooled.parquet",
        guard_tests="<results>/tables/guard_tests.parquet",
        planned_tests="<results>/tables/planned_tests.parquet",
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
        planned=[[pair.policy, pair.other] for pair in experiment.live.planned_tests],
        library=library("summarize_live"),
    script:
        "../workflow_scripts/summarize_live.py"


# A study of its own, not part of `all`: it fits models of its own and reads the test prompts again.
rule study_signals:
    input:
        config="<results>/config.json",
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
        prompts="<results>/prompts/prompts.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        features="<results>/features.parquet",
        labels="<results>/labels.parquet",
        outcomes="<results>/outcomes.parquet",
        splits="<results>/splits.parquet",
        baselines="<results>/models/baselines.json",
        simulation="<results>/simulation.parquet",
        live=every_live_run("<results>/live/{model}/{press}/{ratio}/{policy}/{shard}.parquet"),
    output:
        signal_scores="<results>/tables/signal_scores.parquet",
        signal_tests="<results>/tables/signal_tests.parquet",
        signal_policies="<results>/tables/signal_policies.parquet",
        signal_pairs="<results>/tables/signal_pairs.parquet",
        signal_ladder="<results>/tables/signal_ladder.parquet",
        signal_transfer="<results>/tables/signal_transfer.parquet",
    log:
        "<results>/logs/study_signals.log",
    benchmark:
        "<results>/benchmarks/study_signals.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("train"),
    params:
        library=library("study_signals"),
    script:
        "../workflow_scripts/study_signals.py"


# A price of harm on prompts that fitted nothing. What it leaves is the loss of its certificate; these
# runs enter no comparison of policies, and so lie beside the live ones.
rule run_certifying:
    input:
        checkpoint="<results>/checkpoints/{model}",
        prompts="<results>/prompts/prompts.parquet",
        examples="<results>/prompts/few_shot.json",
        splits="<results>/splits.parquet",
        outcomes="<results>/outcomes.parquet",
        harm_model="<results>/models/harm_model.json",
    output:
        runs="<results>/certifying/{model}/{press}/{ratio}/{price}/{shard}.parquet",
    log:
        "<results>/logs/run_certifying/{model}/{press}/{ratio}/{price}/{shard}.log",
    benchmark:
        "<results>/benchmarks/run_certifying/{model}/{press}/{ratio}/{price}/{shard}.tsv"
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
        places=certifying_places,
        harm_price=lambda wildcards: float(wildcards.price),
        probability_share=experiment.probability_share,
        experiment=lambda wildcards: part(
            "generation",
            "detection",
            "guard",
            "seed",
            task=certifying_places(wildcards)[0],
        ),
        library=library("run_certifying"),
    script:
        "../workflow_scripts/run_certifying.py"


rule certify_price:
    input:
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
        runs=every_certifying_run(
            "<results>/certifying/{model}/{press}/{ratio}/{price}/{shard}.parquet"
        ),
        splits="<results>/splits.parquet",
        harm_model="<results>/models/harm_model.json",
        plan="<results>/models/plan.txt",
        earlier=earlier_certificate(),
        origin=imported("<results>/models/origin.json"),
    output:
        certificate="<results>/models/price_certificate.json",
        summary="<results>/tables/price_certificate.parquet",
        leakage_check="<results>/tables/leakage_check_price.parquet",
    log:
        "<results>/logs/certify_price.log",
    benchmark:
        "<results>/benchmarks/certify_price.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        uses=price_uses(experiment),
        tests={
            "prices": experiment.live.prices_tested,
            "levels": list(experiment.live.certify_levels),
            "delta": experiment.certificate.delta,
        },
        plan=certificate_plan(),
        probability_share=experiment.probability_share,
        library=library("certify_price"),
    script:
        "../workflow_scripts/certify_price.py"
