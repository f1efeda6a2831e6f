# The hazard predictor: splits by prompt, labels, features, training, what it is worth.


rule split_prompts:
    input:
        prompts="<results>/prompts/prompts.parquet",
    output:
        splits="<results>/splits.parquet",
    log:
        "<results>/logs/split_prompts.log",
    benchmark:
        "<results>/benchmarks/split_prompts.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        splits=section("splits"),
        seed=experiment.seed,
        library=library("split_prompts"),
    script:
        "../workflow_scripts/split_prompts.py"


rule label_traces:
    input:
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        outcomes="<results>/outcomes.parquet",
    output:
        labels="<results>/labels.parquet",
    log:
        "<results>/logs/label_traces.log",
    benchmark:
        "<results>/benchmarks/label_traces.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        labels=section("labels"),
        library=library("label_traces"),
    script:
        "../workflow_scripts/label_traces.py"


rule build_features:
    input:
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
    output:
        features="<results>/features.parquet",
    log:
        "<results>/logs/build_features.log",
    benchmark:
        "<results>/benchmarks/build_features.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        library=library("build_features"),
    script:
        "../workflow_scripts/build_features.py"


rule train_predictor:
    input:
        features="<results>/features.parquet",
        labels="<results>/labels.parquet",
        splits="<results>/splits.parquet",
        tokens=audited_tokens(),
    output:
        predictor="<results>/models/hazard_predictor.json",
        targets=collect(
            "<results>/models/hazard_{target}.json", target=experiment.predictor.targets
        ),
        baselines="<results>/models/baselines.json",
        gate="<results>/models/gate_predictor.json",
        predictions="<results>/predictions.parquet",
        training="<results>/tables/training.parquet",
        search_trials="<results>/tables/search_trials.parquet",
        leakage_check="<results>/tables/leakage_check.parquet",
    log:
        "<results>/logs/train_predictor.log",
    benchmark:
        "<results>/benchmarks/train_predictor.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        predictor=section("predictor"),
        guard=supposed_checks(),
        labels=section("labels"),
        seed=experiment.seed,
        library=library("train_predictor"),
    script:
        "../workflow_scripts/train_predictor.py"


rule evaluate_predictor:
    input:
        predictor="<results>/models/hazard_predictor.json",
        targets=collect(
            "<results>/models/hazard_{target}.json", target=experiment.predictor.targets
        ),
        baselines="<results>/models/baselines.json",
        features="<results>/features.parquet",
        labels="<results>/labels.parquet",
        splits="<results>/splits.parquet",
        outcomes="<results>/outcomes.parquet",
    output:
        harm_metrics="<results>/tables/harm_metrics.parquet",
        predictor_metrics="<results>/tables/predictor_metrics.parquet",
        predictor_curves="<results>/tables/predictor_curves.parquet",
        lead_times="<results>/tables/lead_times.parquet",
        detection="<results>/tables/detection.parquet",
        leakage_check="<results>/tables/leakage_check_evaluation.parquet",
    log:
        "<results>/logs/evaluate_predictor.log",
    benchmark:
        "<results>/benchmarks/evaluate_predictor.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        predictor=section("predictor"),
        seed=experiment.seed,
        library=library("evaluate_predictor"),
    script:
        "../workflow_scripts/evaluate_predictor.py"


rule ablate_features:
    input:
        features="<results>/features.parquet",
        labels="<results>/labels.parquet",
        splits="<results>/splits.parquet",
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
    output:
        ablation="<results>/tables/ablation.parquet",
        feature_importance="<results>/tables/feature_importance.parquet",
        formulation="<results>/tables/formulation.parquet",
        controls="<results>/tables/controls.parquet",
        leakage_check="<results>/tables/leakage_check_ablation.parquet",
    log:
        "<results>/logs/ablate_features.log",
    benchmark:
        "<results>/benchmarks/ablate_features.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        predictor=section("predictor"),
        guard=supposed_checks(True),
        labels=section("labels"),
        seed=experiment.seed,
        library=library("ablate_features"),
    script:
        "../workflow_scripts/ablate_features.py"


rule leave_one_out:
    input:
        features="<results>/features.parquet",
        labels="<results>/labels.parquet",
        splits="<results>/splits.parquet",
        tokens=audited_tokens(),
    output:
        leave_one_out="<results>/tables/leave_one_out.parquet",
        transfer="<results>/tables/transfer.parquet",
        leakage_check="<results>/tables/leakage_check_leave_one_out.parquet",
    log:
        "<results>/logs/leave_one_out.log",
    benchmark:
        "<results>/benchmarks/leave_one_out.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        predictor=section("predictor"),
        guard=supposed_checks(),
        labels=section("labels"),
        seed=experiment.seed,
        library=library("leave_one_out"),
    script:
        "../workflow_scripts/leave_one_out.py"
