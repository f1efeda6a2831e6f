# Several shards a job where `jobs.shards_per_job` is above 1: the model is loaded once for all.


for block in [
    *blocks(rules.generate.rule, every_shard()),
    *blocks(rules.find_harm_onsets.rule, every_shard(compressed=True)),
    *blocks(rules.run_live.rule, every_live_shard()),
    *blocks(rules.run_certifying.rule, every_certifying_shard()),
]:

    rule:
        name:
            block.name
        input:
            block.input,
        output:
            block.output,
        log:
            f"<results>/logs/{block.made_by}/blocks/{block.number}.log",
        benchmark:
            f"<results>/benchmarks/{block.made_by}/blocks/{block.number}.tsv"
        conda:
            "../envs/kvguard.yaml"
        threads: experiment.jobs.model.threads
        resources:
            **job("model"),
        params:
            shards=block.shards,
            script=block.made_by,
        script:
            "../workflow_scripts/{params.script}.py"


# With `jobs.list_shards` a plan goes by lists of each block's shards.
for family in [
    *listed(rules.generate.rule),
    *listed(rules.find_harm_onsets.rule),
    *listed(rules.run_live.rule),
]:

    rule:
        name:
            family.name
        input:
            family.input,
        output:
            **family.output,
        log:
            f"<results>/logs/{family.made_by}/blocks/{{block}}.log",
        benchmark:
            f"<results>/benchmarks/{family.made_by}/blocks/{{block}}.tsv"
        wildcard_constraints:
            block=r"\d\d\d+",
        conda:
            "../envs/kvguard.yaml"
        threads: experiment.jobs.model.threads
        resources:
            **job("model"),
        params:
            shards=family.shards,
            script=family.made_by,
        script:
            "../workflow_scripts/{params.script}.py"
