# What people look at: figures, tables as CSV, the viewer, the report; and the manifest of the run.


rule draw_figures:
    input:
        condition_summary="<results>/tables/condition_summary.parquet",
        excess="<results>/tables/excess.parquet",
        sensitivity="<results>/tables/sensitivity.parquet",
        timeline="<results>/timeline.parquet",
        outcomes="<results>/outcomes.parquet",
        predictor_curves="<results>/tables/predictor_curves.parquet",
        lead_times="<results>/tables/lead_times.parquet",
        policies="<results>/tables/policies.parquet",
        memory="<results>/tables/memory.parquet",
        pareto="<results>/tables/pareto.parquet",
        certificate="<results>/models/certificate.json",
    output:
        rates=report(
            "<results>/figures/rates.png",
            caption="../reports/captions/rates.rst",
            category="Figures",
            subcategory="Failures",
            labels={"figure": "rates"},
        ),
        failure_kinds=report(
            "<results>/figures/failure_kinds.png",
            caption="../reports/captions/failure_kinds.rst",
            category="Figures",
            subcategory="Failures",
            labels={"figure": "kinds of failure"},
        ),
        excess=report(
            "<results>/figures/excess.png",
            caption="../reports/captions/excess.rst",
            category="Figures",
            subcategory="Failures",
            labels={"figure": "excess failures"},
        ),
        sensitivity=report(
            "<results>/figures/sensitivity.png",
            caption="../reports/captions/sensitivity.rst",
            category="Figures",
            subcategory="Failures",
            labels={"figure": "sensitivity to the definitions"},
        ),
        trace=report(
            "<results>/figures/trace.png",
            caption="../reports/captions/trace.rst",
            category="Figures",
            subcategory="Failures",
            labels={"figure": "one answer"},
        ),
        predictor=report(
            "<results>/figures/predictor.png",
            caption="../reports/captions/predictor.rst",
            category="Figures",
            subcategory="Predictor",
            labels={"figure": "curves before onset"},
        ),
        lead_time=report(
            "<results>/figures/lead_time.png",
            caption="../reports/captions/lead_time.rst",
            category="Figures",
            subcategory="Predictor",
            labels={"figure": "lead time"},
        ),
        policies=report(
            "<results>/figures/policies.png",
            caption="../reports/captions/policies.rst",
            category="Figures",
            subcategory="Guard",
            labels={"figure": "policies, live"},
        ),
        pareto_memory=report(
            "<results>/figures/pareto_memory.png",
            caption="../reports/captions/pareto.rst",
            category="Figures",
            subcategory="Guard",
            labels={"figure": "harm against memory"},
        ),
        pareto_prefill=report(
            "<results>/figures/pareto_prefill.png",
            caption="../reports/captions/pareto.rst",
            category="Figures",
            subcategory="Guard",
            labels={"figure": "harm against prefill"},
        ),
        simulation_gap=report(
            "<results>/figures/simulation_gap.png",
            caption="../reports/captions/simulation_gap.rst",
            category="Figures",
            subcategory="Guard",
            labels={"figure": "simulation against live"},
        ),
        memory=report(
            "<results>/figures/memory.png",
            caption="../reports/captions/memory.rst",
            category="Figures",
            subcategory="Guard",
            labels={"figure": "memory of one request"},
        ),
        pdf=collect("<results>/figures/{figure}.pdf", figure=FIGURES),
    log:
        "<results>/logs/draw_figures.log",
    benchmark:
        "<results>/benchmarks/draw_figures.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: experiment.jobs.small.threads
    resources:
        **job("small"),
    params:
        presses=[press.name for press in experiment.presses],
        operating_point=experiment.live.operating_point,
        library=library("draw_figures"),
    script:
        "../workflow_scripts/draw_figures.py"


rule export_tables:
    input:
        tables=every_table("parquet"),
    output:
        tables=[table_report(name) for name in TABLES],
    log:
        "<results>/logs/export_tables.log",
    benchmark:
        "<results>/benchmarks/export_tables.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        library=library("export_tables"),
    script:
        "../workflow_scripts/export_tables.py"


rule render_viewer:
    input:
        timeline="<results>/timeline.parquet",
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        outcomes="<results>/outcomes.parquet",
        prompts="<results>/prompts/prompts.parquet",
        certificate="<results>/models/certificate.json",
        template=workflow.source_path("../reports/viewer.html"),
    output:
        viewer=report(
            "<results>/viewer.html",
            caption="../reports/captions/viewer.rst",
            category="Viewer",
            labels={"page": "requests, token by token"},
        ),
    log:
        "<results>/logs/render_viewer.log",
    benchmark:
        "<results>/benchmarks/render_viewer.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        title=experiment.name,
        operating_point=experiment.live.operating_point,
        library=library("render_viewer"),
    script:
        "../workflow_scripts/render_viewer.py"


rule write_findings:
    input:
        config="<results>/config.json",
        certificate="<results>/models/certificate.json",
        tables=every_table("parquet"),
    output:
        findings="<results>/findings.md",
    log:
        "<results>/logs/write_findings.log",
    benchmark:
        "<results>/benchmarks/write_findings.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        library=library("write_findings"),
    script:
        "../workflow_scripts/write_findings.py"


rule write_manifest:
    input:
        records=["<results>/config.json", "<results>/provenance.json"],
        prompts=["<results>/prompts/prompts.parquet", "<results>/prompts/few_shot.json"],
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        derived=collect(
            "<results>/{table}.parquet",
            table=["outcomes", "splits", "labels", "features", "predictions", "simulation"],
        ),
        models=collect(
            "<results>/models/{name}.json",
            name=["hazard_predictor", "baselines", "certificate"],
        ),
        targets=collect(
            "<results>/models/hazard_{target}.json", target=experiment.predictor.targets
        ),
        live=every_live_run("<results>/live/{model}/{press}/{ratio}/{policy}/{shard}.parquet"),
        tables=every_table("parquet"),
        csv=every_table("csv"),
    output:
        manifest="<results>/manifest.json",
    log:
        "<results>/logs/write_manifest.log",
    benchmark:
        "<results>/benchmarks/write_manifest.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        library=library("write_manifest"),
    script:
        "../workflow_scripts/write_manifest.py"


rule render_report:
    input:
        rules.draw_figures.output,
        rules.export_tables.output,
        rules.render_viewer.output,
        config="<results>/config.json",
        captions=captions(),
    output:
        report="<results>/report.html",
    log:
        "<results>/logs/render_report.log",
    benchmark:
        "<results>/benchmarks/render_report.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        snakefile=workflow.main_snakefile,
        library=library("render_report"),
    script:
        "../workflow_scripts/render_report.py"
