# Models of another run, in place of the rules that train and calibrate them.


ruleorder: import_models > train_predictor > fit_rivals > fit_harm_model > calibrate_controller


# In no group of a cluster, so that what it refuses need not be generated.
rule import_models:
    input:
        prompts="<results>/prompts/prompts.parquet",
        checkpoints=collect("<results>/checkpoints/{model.name}", model=experiment.models),
    output:
        models=imported(collect("<results>/models/{name}", name=imported_files())),
        origin="<results>/models/origin.json",
        table="<results>/tables/imported_models.parquet",
    log:
        "<results>/logs/import_models.log",
    benchmark:
        "<results>/benchmarks/import_models.tsv"
    priority: 90
    conda:
        "../envs/kvguard.yaml"
    threads: 1
    resources:
        **job("small"),
    params:
        experiment=lambda wildcards: part(
            *("models", "tasks", "presses"),
            generation=["do_sample", "temperature", "top_p"],
            predictor=["trained_by"],
            live=["policies", "conditions", "certify_prices"],
        ),
        models=[model.name for model in experiment.models],
        manifest=source_manifest(),
        library=library("import_models"),
    script:
        "../workflow_scripts/import_models.py"
