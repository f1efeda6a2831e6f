# The controller: thresholds with a certificate, and what they would have done to stored requests.


# Recorded before any prompt is generated: it needs nothing, and goes before all that could start
# with it. No rule of generation depends on it, since Snakemake evaluates no other trigger behind an
# `ancient` input that is made again. The ledger says whether answers were there already.
rule freeze_plan:
    output:
        plan="<results>/models/plan.txt",
    log:
        "<results>/logs/freeze_plan.log",
    benchmark:
        "<results>/benchmarks/freeze_plan.tsv"
    priority: 100
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        plan=certificate_plan(),
        library=library("freeze_plan"),
    script:
        "../workflow_scripts/freeze_plan.py"


rule calibrate_controller:
    input:
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
        predictor="<results>/models/hazard_predictor.json",
        predictions="<results>/predictions.parquet",
        outcomes="<results>/outcomes.parquet",
        splits="<results>/splits.parquet",
        plan="<results>/models/plan.txt",
    output:
        certificate="<results>/models/certificate.json",
        summary="<results>/tables/certificate.parquet",
        grid="<results>/tables/certificate_grid.parquet",
        leakage_check="<results>/tables/leakage_check_calibration.parquet",
    log:
        "<results>/logs/calibrate_controller.log",
    benchmark:
        "<results>/benchmarks/calibrate_controller.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        controller=section("controller"),
        certificate=section("certificate"),
        uses=certificate_uses(experiment),
        plan=certificate_plan(),
        library=library("calibrate_controller"),
    script:
        "../workflow_scripts/calibrate_controller.py"


rule fit_rivals:
    input:
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        outcomes="<results>/outcomes.parquet",
        splits="<results>/splits.parquet",
        baselines="<results>/models/baselines.json",
    output:
        rivals="<results>/models/rivals.json",
    log:
        "<results>/logs/fit_rivals.log",
    benchmark:
        "<results>/benchmarks/fit_rivals.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        library=library("fit_rivals"),
    script:
        "../workflow_scripts/fit_rivals.py"


rule fit_harm_model:
    input:
        traces=every_trace(
            "<results>/traces/{model}/{press}/{ratio}/{shard}.parquet", compressed=True
        ),
        tokens=every_trace(
            "<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet", compressed=True
        ),
        outcomes="<results>/outcomes.parquet",
        splits="<results>/splits.parquet",
        baselines="<results>/models/baselines.json",
    output:
        harm_model="<results>/models/harm_model.json",
    log:
        "<results>/logs/fit_harm_model.log",
    benchmark:
        "<results>/benchmarks/fit_harm_model.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        probability_share=experiment.predictor.probability_share,
        library=library("fit_harm_model"),
    script:
        "../workflow_scripts/fit_harm_model.py"


rule simulate_controller:
    input:
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
        prompts="<results>/prompts/prompts.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        outcomes="<results>/outcomes.parquet",
        predictions="<results>/predictions.parquet",
        splits="<results>/splits.parquet",
        certificate="<results>/models/certificate.json",
        rivals="<results>/models/rivals.json",
        baselines="<results>/models/baselines.json",
        harm_model="<results>/models/harm_model.json",
    output:
        simulation="<results>/simulation.parquet",
    log:
        "<results>/logs/simulate_controller.log",
    benchmark:
        "<results>/benchmarks/simulate_controller.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        models=[model.name for model in experiment.models],
        experiment=part("guard", "detection", live=live_settings()),
        library=library("simulate_controller"),
    script:
        "../workflow_scripts/simulate_controller.py"


rule summarize_simulation:
    input:
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        outcomes="<results>/outcomes.parquet",
        predictions="<results>/predictions.parquet",
        splits="<results>/splits.parquet",
        certificate="<results>/models/certificate.json",
        simulation="<results>/simulation.parquet",
    output:
        operating_points="<results>/tables/operating_points.parquet",
        pareto="<results>/tables/pareto.parquet",
        simulability="<results>/tables/simulability.parquet",
    log:
        "<results>/logs/summarize_simulation.log",
    benchmark:
        "<results>/benchmarks/summarize_simulation.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.train.threads
    resources:
        **job("train"),
    params:
        models=[model.name for model in experiment.models],
        experiment=part("guard", "controller", "seed", predictor=["bootstrap_samples"]),
        library=library("summarize_simulation"),
    script:
        "../workflow_scripts/summarize_simulation.py"


rule build_timeline:
    input:
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        predictions="<results>/predictions.parquet",
        certificate="<results>/models/certificate.json",
    output:
        timeline="<results>/timeline.parquet",
    log:
        "<results>/logs/build_timeline.log",
    benchmark:
        "<results>/benchmarks/build_timeline.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        models=[model.name for model in experiment.models],
        operating_point=experiment.live.operating_point,
        library=library("build_timeline"),
    script:
        "../workflow_scripts/build_timeline.py"
