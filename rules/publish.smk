# Outputs for readers: figures, tables as CSV, the viewer, the report; and the manifest of the run.


rule draw_figure:
    input:
        unpack(figure_files),
    output:
        png=report(
            "<results>/figures/{figure}.png",
            caption="../reports/captions/figure.rst",
            category="Figures",
            subcategory=lambda wildcards: FIGURES[wildcards.figure].section,
            labels=lambda wildcards: {"figure": FIGURES[wildcards.figure].title},
        ),
        pdf="<results>/figures/{figure}.pdf",
    log:
        "<results>/logs/draw_figure/{figure}.log",
    benchmark:
        "<results>/benchmarks/draw_figure/{figure}.tsv"
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        presses=[press.name for press in experiment.presses],
        operating_point=experiment.live.operating_point,
        caption=lambda wildcards: FIGURES[wildcards.figure].caption,
        library=lambda wildcards: figure_digest(wildcards.figure),
    script:
        "../workflow_scripts/draw_figure.py"


rule export_tables:
    input:
        tables=every_table("parquet"),
    output:
        tables=[table_report(name) for name in run_tables()],
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
        template=data_digest("viewer.html"),
        operating_point=experiment.live.operating_point,
        library=library("render_viewer"),
    script:
        "../workflow_scripts/render_viewer.py"


rule write_findings:
    input:
        config="<results>/config.json",
        certificate=trained("<results>/models/certificate.json"),
        origin=imported("<results>/models/origin.json"),
        price_certificate=price_certificate(),
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
        records=[
            "<results>/config.json",
            "<results>/provenance.json",
            "<results>/models/plan.txt",
        ],
        prompts=["<results>/prompts/prompts.parquet", "<results>/prompts/few_shot.json"],
        traces=every_trace("<results>/traces/{model}/{press}/{ratio}/{shard}.parquet"),
        tokens=every_trace("<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"),
        onsets=every_trace(
            "<results>/harm_onsets/{model}/{press}/{ratio}/{shard}.parquet",
            compressed=True,
        ),
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
        derived=collect(
            "<results>/{table}.parquet",
            table=[
                *("outcomes", "splits"),
                *trained(["labels", "features", "predictions", "simulation"]),
            ],
        ),
        models=collect("<results>/models/{name}", name=model_files_of_run()),
        live=every_live_run("<results>/live/{model}/{press}/{ratio}/{policy}/{shard}.parquet"),
        certifying=every_certifying_run(
            "<results>/certifying/{model}/{press}/{ratio}/{price}/{shard}.parquet"
        ),
        price_certificate=price_certificate(),
        tables=every_table("parquet"),
        csv=every_table("csv"),
        timeline=trained("<results>/timeline.parquet"),
        database="<results>/kvguard.duckdb",
        figures=rules.figures.input,
        published=[
            *("<results>/findings.md", "<results>/report.html"),
            *trained(["<results>/viewer.html"]),
        ],
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
        rules.figures.input,
        rules.export_tables.output,
        trained(rules.render_viewer.output),
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
        shown=["figures", "export_tables", *trained(["render_viewer"])],
        library=library("render_report"),
    script:
        "../workflow_scripts/render_report.py"
