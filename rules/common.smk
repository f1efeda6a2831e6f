# Helpers of the rules: the checked configuration, wildcards, resources, digests of library code.
import atexit
import inspect
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from snakemake.exceptions import WorkflowError
from snakemake.io import is_callable, strip_wildcard_constraints
from snakemake.iocontainers import Wildcards
from snakemake.logging import logger

from kvguard.blocks import block_name, cut, pack, rule_of_block
from kvguard.code_digest import (
    PACKAGE,
    KnownDigests,
    code_digest,
    data_digest,
    definition_digest,
)
from kvguard.config import BASELINE, BASELINE_RATIO, POLICIES, ConfigError, digest, parse_config
from kvguard.figures import FIGURES
from kvguard.imported_models import needed_files, source_digest
from kvguard.progress import PlannedJob, plan_digest, run_summary, write_plan
from kvguard.provenance import made_otherwise
from kvguard.shard_lists import list_name
from kvguard.splits import check_split_sizes
from kvguard.workflow import certificate_uses, price_uses, workflow_folder

FOLDER = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parent
"""Of this workflow, which another one may use as a module from wherever it is."""
if not (FOLDER / "workflow_scripts").is_dir():
    FOLDER = workflow_folder()  # a module from a host: the scripts that were installed are the same


known_digests = KnownDigests(
    Path(".snakemake/kvguard_code.json").absolute(), [FOLDER / "workflow_scripts", PACKAGE]
)
atexit.register(known_digests.save)


def read_config(values):
    """The checked configuration; a wrong one ends Snakemake with the field and what it accepts."""
    try:
        checked = parse_config(values)
        for task in checked.tasks:
            check_split_sizes(task.name, task.num_prompts, checked.splits)
        if checked.imports_models:
            source_digest(checked)
    except (ConfigError, ValueError) as error:
        raise WorkflowError(str(error)) from None
    return checked


def any_of(names):
    """A regular expression that matches one of the names and nothing else."""
    return "|".join(re.escape(name) for name in sorted(set(names)))


def job(kind):
    """Resources of one kind of job, from the configuration's section `jobs`.

    A job that is retried asks for its memory and its minutes once more with every attempt.
    """
    asked = getattr(experiment.jobs, kind)
    resources = {
        "mem_mb": lambda wildcards, attempt: asked.mem_mb * attempt,
        "runtime": lambda wildcards, attempt: asked.runtime * attempt,
        "gpu": asked.gpu,
    }
    if asked.partition is not None:
        resources["slurm_partition"] = asked.partition
    if asked.account is not None:
        resources["slurm_account"] = asked.account
    return resources


def library(rule, only=None):
    """Digest of a rule's script and of the kvguard code that it reaches: a change reruns the rule.

    `only` maps a dict literal of the library, "module.NAME", to the one entry that the job reads.
    """
    script = FOLDER / "workflow_scripts" / f"{rule}.py"
    return known_digests.get(f"{rule} {only}", lambda: code_digest(script, only))


# What a plan asks again for every one of its ten thousand jobs is computed once. Nobody changes what
# these return: Snakemake writes it into its records.


@cache
def plain_experiment():
    """The configuration as plain built-ins."""
    return experiment.model_dump(mode="json", by_alias=True)


@cache
def shard_list():
    """Places of the prompts of each shard, and the task that they belong to."""
    ends, places = [], []
    for task in experiment.tasks:
        ends.append(((ends[-1][0] if ends else 0) + task.num_prompts, task.name))
    for shard in experiment.shards:
        task = next(name for end, name in ends if shard.start < end)
        places.append([shard.start, shard.stop, task])
    return places


@cache
def live_shard_list():
    """Task, part and number of parts of each live shard."""
    return [list(shard) for shard in experiment.live_shards]


def section(name):
    """One section of the configuration as plain built-ins, which Snakemake can compare."""
    return plain_experiment()[name]


def part(*names, task=None, **fields):
    """Sections of the configuration for `config.config_part`: what a script reads, no more.

    `fields` are sections of which only some fields count, `task` names the one task that does.
    """
    values = plain_experiment()
    chosen = {name: values[name] for name in names}
    for name, kept in fields.items():
        chosen[name] = {field: values[name][field] for field in kept}
    if task is not None:
        chosen["tasks"] = [entry for entry in values["tasks"] if entry["name"] == task]
    return chosen


def reads_evidence():
    """Whether the predictor reads what checks have said."""
    return experiment.predictor.feature_set == "with_evidence"


def audited_tokens():
    """Token files, where the predictor reads what checks would have said of them."""
    pattern = "<results>/tokens/{model}/{press}/{ratio}/{shard}.parquet"
    return every_trace(pattern) if reads_evidence() else []


def supposed_checks(always=False):
    """How the guard checks, where that decides what the predictor reads."""
    fields = ("check_every_tokens", "margin_nats") if always or reads_evidence() else ()
    return {field: section("guard")[field] for field in fields}


def shard_places(wildcards):
    """First and last place, and task, of the prompts that one shard holds."""
    return shard_list()[int(wildcards.shard)]


def live_places(wildcards):
    """Task, part and number of parts of the test prompts that one live shard holds."""
    return live_shard_list()[int(wildcards.shard)]


def certifying_places(wildcards):
    """Task, part and number of parts of the certifying prompts that one shard holds."""
    return list(experiment.certifying_shards[int(wildcards.shard)])


@cache
def plain_model(name):
    """One model's entry as plain built-ins."""
    return experiment.model(name).model_dump(mode="json")


def model_settings(wildcards, *names):
    """Fields of one model's entry; all of them when no names are given."""
    settings = plain_model(wildcards.model)
    return {name: settings[name] for name in names} if names else settings


def model_files(wildcards):
    """Files outside the results that preparing a model reads."""
    model = experiment.model(wildcards.model)
    if model.source == "gguf":
        return [model.path]
    return [model.path / "config.json"] if model.source == "local" else []


def task_files():
    """Files outside the results that the tasks read."""
    return [path for task in experiment.tasks for path in task.files]


def press_settings(wildcards):
    """What decides how one press compresses, None for the baseline; its other ratios do not.

    A ladder chooses among them, from the job's own down.
    """
    if wildcards.press == BASELINE:
        return None
    ratios = [wildcards.ratio]
    if getattr(wildcards, "policy", None) == "ladder":
        ratios = [each for each in experiment.press(wildcards.press).ratios if each <= ratios[0]]
    return plain_press(wildcards.press) | {"ratios": ratios}


@cache
def plain_press(name):
    """One press's entry as plain built-ins, without its ratios."""
    return experiment.press(name).model_dump(
        mode="json", by_alias=True, exclude={"ratios", "live_ratios"}
    )


def every_trace(pattern, compressed=False):
    """Paths of all (model, press, ratio, shard), in the order of the configuration.

    ``compressed`` leaves out the uncompressed baseline. Where blocks are listed, their lists.
    """
    if experiment.jobs.list_shards:
        return lists(pattern, lambda shard: not (compressed and shard["press"] == BASELINE))
    return [
        path
        for model in experiment.models
        for press, ratio in experiment.conditions
        if not (compressed and press == BASELINE)
        for path in collect(
            pattern,
            model=model.name,
            press=press,
            ratio=ratio,
            shard=[f"{shard:02d}" for shard in range(len(experiment.shards))],
        )
    ]


def live_conditions():
    """(press, ratio) pairs of the live experiment: those listed, or all but the baseline."""
    return experiment.live_conditions


def every_live_run(pattern):
    """Paths of all (model, press, ratio, policy, shard) of the live experiment, or their lists."""
    if experiment.jobs.list_shards:
        return lists(pattern, is_wanted)
    shards = len(experiment.live_shards)
    return [
        path
        for press, ratio in live_conditions()
        for path in collect(
            pattern,
            model=[model.name for model in experiment.models],
            press=press,
            ratio=ratio,
            policy=experiment.live_policies(press, ratio),
            shard=[f"{shard:02d}" for shard in range(shards)],
        )
    ]


def every_certifying_shard():
    """Wildcards of all (model, press, ratio, price, shard) of the runs that certify prices."""
    return [
        {"model": model.name, "press": press, "ratio": ratio, "price": price, "shard": shard}
        for model in experiment.models
        for press, ratio in live_conditions()
        for price in prices_tested()
        for shard in (f"{shard:02d}" for shard in range(len(experiment.certifying_shards)))
    ]


def every_certifying_run(pattern):
    """Paths of the runs that certify prices; none where no price is to be certified."""
    return [path for shard in every_certifying_shard() for path in collect(pattern, **shard)]


def prices_tested():
    """Prices of harm as they are written in paths, in the order of their tests."""
    return [f"{price:g}" for price in experiment.live.prices_tested]


def price_certificate():
    """The certificate over the price, where there is one."""
    return "<results>/models/price_certificate.json" if experiment.live.certify_prices else []


def earlier_certificate():
    """The certificate of thresholds, so that the ledger counts it before that of prices."""
    return trained("<results>/models/certificate.json")


def certified_price():
    """The file that says the price of `guard_price`, where the configuration leaves that to it."""
    certified = experiment.live.harm_price == "certified"
    return {"price_certificate": price_certificate()} if certified else {}


class ShardRule:
    """What a rule of one shard reads and writes, and its parameters, as plain values.

    A plan of ten thousand shards asks for all of them. Snakemake's own answer takes 1 ms a shard,
    and is asked where a rule has more than patterns of files and functions of wildcards.
    """

    def __init__(self, rule):
        self.rule, self.name = rule, rule.name
        self.read, self.written = None, patterns(rule.output)
        if not any(map(is_callable, rule.input)):
            self.read = patterns(rule.input)
        given = [inspect.signature(value) for value in rule.params if callable(value)]
        self.plain_params = all(list(signature.parameters) == ["wildcards"] for signature in given)

    def input(self, shard):
        """Files that a shard reads, by name."""
        if self.read is not None:
            return filled(self.read, shard)
        return named_files(self.rule.expand_input(Wildcards(fromdict=shard))[0])

    def output(self, shard):
        """Files of a shard, by name."""
        return filled(self.written, shard)

    def params(self, shard):
        """Parameters of a shard's job, by name."""
        if self.plain_params:
            wildcards = SimpleNamespace(**shard)
            given = self.rule.params.items()
            return {name: each(wildcards) if callable(each) else each for name, each in given}
        wildcards = Wildcards(fromdict=shard)
        files = self.rule.expand_input(wildcards)[0], self.rule.expand_output(wildcards)[0]
        return dict(self.rule.expand_params(wildcards, *files, None)[0].items())

    def read_by_any(self, shards):
        """What any of some shards reads, each file once."""
        read = {}
        for shard in shards:
            for given in self.input(shard).values():
                read.update(dict.fromkeys([given] if isinstance(given, str) else given))
        return list(read)

    def packed(self, shards):
        """Wildcards, files and parameters of some shards, for `kvguard.blocks.read_shards`."""
        parts = {
            "wildcards": shards,
            "input": map(self.input, shards),
            "output": map(self.output, shards),
            "params": map(self.params, shards),
        }
        return {part: pack(list(rows)) for part, rows in parts.items()}


class Block:
    """One job that makes several shards of a rule: its name, files and parameters."""

    def __init__(self, single, number, shards):
        self.template, self.made_by, self.wildcards = single, single.name, shards
        self.name, self.number = block_name(single.name, number), f"{number:03d}"

    @property
    def output(self):
        """Files of all shards."""
        return [path for shard in self.wildcards for path in self.template.output(shard).values()]

    def input(self, wildcards):
        """What any of the shards reads, each file once."""
        return in_lists(self.template.read_by_any(self.wildcards))

    def shards(self, wildcards):
        """Wildcards, files and parameters of each shard, for `kvguard.blocks.read_shards`."""
        return self.template.packed(self.wildcards)


class ListedBlocks:
    """All blocks of a rule, as one rule whose outputs are lists of each block's shards."""

    def __init__(self, single):
        self.template, self.made_by, self.name = single, single.name, block_name(single.name)

    @property
    def output(self):
        """Pattern of the lists, by the name of the output that they list."""
        files = self.template.written.items()
        return {name: list_path(table_of(path), "{block}") for name, path in files}

    def input(self, wildcards):
        """What any of the shards reads, each file once; lists in place of shards.

        Snakemake does not know the shards: where one is gone whose list is there, such as one that
        was removed because it is damaged, the plan is told to make the list again.
        """
        shards = self.block(wildcards)
        if workflow.is_main_process:
            written = (path for each in shards for path in self.template.output(each).values())
            lost = {list_of()[path] for path in written if not is_there(path)}
            workflow.dag.forcefiles.update(filter(is_there, lost))
        return in_lists(self.template.read_by_any(shards))

    def shards(self, wildcards):
        """As `Block.shards`."""
        return self.template.packed(self.block(wildcards))

    def block(self, wildcards):
        """Wildcards of each shard of a block."""
        return listed_blocks(self.made_by)[int(wildcards.block)]


def patterns(files):
    """Patterns of a rule's files by name, with the names of wildcards alone in braces."""
    return {name: strip_wildcard_constraints(str(path)) for name, path in files.items()}


def filled(files, shard):
    """Paths by name, with a shard's wildcards."""
    return {name: pattern.format_map(shard) for name, pattern in files.items()}


def named_files(files):
    """Paths by name; more than one under a name as a list."""
    return {
        name: str(given) if isinstance(given, str) else list(map(str, given))
        for name, given in files.items()
    }


def blocks(single, shards):
    """Blocks of a rule's shards, given by their wildcards; none where each shard is a job.

    One block holds shards of one model, loaded in one way. A rival that is matched to the guard
    waits for the guard's runs, and what repeats a run waits for that one, so that they are of
    different blocks.
    """
    if experiment.jobs.shards_per_job == 1 or is_listed(single):
        return []
    size = experiment.jobs.shards_per_job
    ordered = sorted(shards, key=lambda shard: str(together(shard)))
    return [
        Block(ShardRule(single), number, block)
        for number, block in enumerate(cut(ordered, size, together))
    ]


def together(shard):
    """What shards of one block have in common."""
    press = None if shard["press"] == BASELINE else experiment.press(shard["press"])
    matched = shard.get("policy") == "constant"
    repeats = "policy" in shard and full_cache_run(**shard) is not None
    return shard["model"], press and press.attention, matched, repeats


LISTED_TABLES = {
    "traces": "generate",
    "tokens": "generate",
    "harm_onsets": "find_harm_onsets",
    "live": "run_live",
}
"""Tables whose shards are listed where `jobs.list_shards` is set, and the rules that make them."""


def is_listed(single):
    """Whether a plan goes by lists of a rule's shards."""
    return experiment.jobs.list_shards and single.name in LISTED_TABLES.values()


def listed(single):
    """All blocks of a rule as one rule; none where plans go by its shards."""
    return [ListedBlocks(ShardRule(single))] if is_listed(single) else []


@cache
def listed_blocks(made_by):
    """Blocks of a rule's shards, in the order in which the tables are read.

    A block never holds shards that only some of the tables' readers want, or that wait for
    different files.
    """

    def alike(shard):
        waits_for = policy_files(Wildcards(fromdict=shard)) if "policy" in shard else {}
        return together(shard), shard["press"] == BASELINE, is_wanted(shard), sorted(waits_for)

    if made_by == "run_live":
        shards = every_live_shard()
        wanted = [
            {"model": model.name, "press": press, "ratio": ratio, "policy": policy, "shard": shard}
            for press, ratio in live_conditions()
            for model in experiment.models
            for policy in experiment.live_policies(press, ratio)
            for shard in (f"{shard:02d}" for shard in range(len(experiment.live_shards)))
        ]
        shards = wanted + [shard for shard in shards if not is_wanted(shard)]
    else:
        shards = every_shard(compressed=made_by == "find_harm_onsets")
    return list(cut(shards, experiment.jobs.shards_per_job, alike))


def is_wanted(shard):
    """Whether tables read a shard: a live run may be there only for what is matched to it."""
    if "policy" not in shard:
        return True
    return shard["policy"] in experiment.live_policies(shard["press"], shard["ratio"])


def table_of(path):
    """The folder of a table's files below the results."""
    return Path(path).relative_to(experiment.results_dir).parts[0]


def list_path(table, block):
    """The list of a block's shards of one table."""
    return f"{experiment.results_dir}/{list_name(table, block)}"


def lists(pattern, wanted):
    """The lists of a table's blocks, those whose shards are wanted."""
    table = pattern.split("/")[1]
    return [
        list_path(table, f"{number:03d}")
        for number, block in enumerate(listed_blocks(LISTED_TABLES[table]))
        if wanted(block[0])
    ]


def in_lists(paths):
    """Paths with shards replaced by the lists that name them, where there are lists; each once."""
    return list(dict.fromkeys(list_of().get(path, path) for path in paths))


@cache
def list_of():
    """The list of every shard's file; empty where plans go by shards."""
    if not experiment.jobs.list_shards:
        return {}
    return {
        f"{Path(experiment.results_dir, table, *shard.values())}.parquet": list_path(
            table, f"{number:03d}"
        )
        for table, rule in LISTED_TABLES.items()
        for number, block in enumerate(listed_blocks(rule))
        for shard in block
    }


@cache
def files_there(folder):
    """Names of the files in a folder: one look at it, where a plan asks for thousands of shards."""
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def is_there(path):
    """Whether a file was there when this plan first looked at its folder."""
    folder, name = os.path.split(path)
    return name in files_there(folder)


def single_shards():
    """Wildcard constraint of the rules of one shard, which match nothing where blocks are made."""
    return r"\d\d+" if experiment.jobs.shards_per_job == 1 else r"(?!)"


def every_shard(compressed=False):
    """Wildcards of all (model, press, ratio, shard), in the order of the configuration.

    ``compressed`` leaves out the uncompressed baseline.
    """
    return [
        {"model": model.name, "press": press, "ratio": ratio, "shard": f"{shard:02d}"}
        for model in experiment.models
        for press, ratio in experiment.conditions
        if not (compressed and press == BASELINE)
        for shard in range(len(experiment.shards))
    ]


def every_live_shard():
    """Wildcards of all (model, press, ratio, policy, shard) of the live experiment.

    The runs that a matched rival waits for are there too.
    """
    policies = list(experiment.live.policies)
    if "constant" in policies and "guard_promote" not in policies:
        policies.append("guard_promote")
    return [
        {"model": model.name, "press": press, "ratio": ratio, "policy": policy, "shard": shard}
        for model in experiment.models
        for press, ratio in live_conditions()
        for policy in policies
        for shard in (f"{shard:02d}" for shard in range(len(experiment.live_shards)))
    ]


def policy_files(wildcards):
    """What a policy needs beyond the model: a guard its predictor, a matched rival what it matches."""
    files = {}
    if POLICIES[wildcards.policy].needs_hazard:
        files["predictor"] = "<results>/models/hazard_predictor.json"
        files["certificate"] = "<results>/models/certificate.json"
    if wildcards.policy in ("random", "constant"):
        files["simulation"] = "<results>/simulation.parquet"
    if wildcards.policy == "constant":
        live = "<results>/live/{model}/{press}/{ratio}/guard_promote/{shard}.parquet"
        shards = [f"{shard:02d}" for shard in range(len(experiment.live_shards))]
        files["guard_runs"] = collect(
            live,
            model=wildcards.model,
            press=wildcards.press,
            ratio=wildcards.ratio,
            shard=shards,
        )
    if wildcards.policy in ("clock_or_loop", "gate", "ladder"):
        files["rivals"] = "<results>/models/rivals.json"
    if wildcards.policy == "guard_price":
        files["harm_model"] = "<results>/models/harm_model.json"
        files |= certified_price()
    if wildcards.policy in ("gate", "ladder"):
        files["baselines"] = "<results>/models/baselines.json"
    repeated = full_cache_run(**wildcards)
    if repeated is not None:
        files["full_cache"] = repeated
    return files


def full_cache_run(model, press, ratio, policy, shard):
    """The live run of `always_safe` that this one repeats; None: it runs itself.

    On the full cache no press is at work, so that one condition's run is that of all which load the
    model alike; `offload` is the same answers with counted costs. `shared_prefix` repeats its own.
    """
    full = ("always_safe", "offload", "shared_prefix")
    if policy not in full or experiment.guard.safe_ratio != BASELINE_RATIO:
        return None
    source = "shared_prefix" if policy == "shared_prefix" else "always_safe"
    attention = experiment.press(press).attention
    for first, at in live_conditions():
        if experiment.press(first).attention == attention:
            break
    if source not in experiment.live.policies:
        return None
    if (policy, press, ratio) == (source, first, at):
        return None
    return f"<results>/live/{model}/{first}/{at}/{source}/{shard}.parquet"


def imported_files():
    """Model files that come from the run that `predictor.trained_by` names."""
    return list(needed_files(experiment))


@cache
def source_manifest():
    """Digest of the manifest of the run whose models are used: another one is imported anew."""
    return source_digest(experiment) if experiment.imports_models else None


def trained(files):
    """Files that only a run that trains makes; none where the models are another run's."""
    return [] if experiment.imports_models else files


def imported(files):
    """Files that only a run that uses another one's models makes."""
    return files if experiment.imports_models else []


def model_files_of_run():
    """Names of the files in `models` that stand in the manifest."""
    if experiment.imports_models:
        return [*imported_files(), "origin.json"]
    own = ("hazard_predictor", "gate_predictor", "baselines", "certificate", "rivals", "harm_model")
    hazards = [f"hazard_{target}" for target in experiment.predictor.targets]
    return [f"{name}.json" for name in (*own, *hazards)]


def certificate_plan():
    """Digest of what the certificate depends on but the prompts: configuration and code."""
    sections = (
        *("models", "tasks", "presses", "generation", "detection", "labels", "splits"),
        *("predictor", "guard", "controller", "certificate", "seed"),
    )
    rules = ("train_predictor", "build_features", "detect_outcomes", "calibrate_controller")
    plan = {name: section(name) for name in sections}
    plan["guard"] = {name: kept for name, kept in plan["guard"].items() if name != "bus_ratio"}
    if experiment.imports_models:
        plan["source"] = source_manifest()
    if experiment.live.certify_prices:
        rules = (*rules, "fit_harm_model", "run_certifying", "certify_price")
        plan["prices"] = [experiment.live.prices_tested, section("live")["certify_levels"]]
        plan["prices"] += [experiment.live_conditions, section("guard")["bus_ratio"]]
    return digest(plan | {"code": [library(rule) for rule in rules]})


def live_settings():
    """Fields of the live experiment's section, without those that no policy reads."""
    others = ("policies", "planned_tests", "conditions", "shard_size")
    others += ("certify_prices", "certify_levels")
    return [name for name in section("live") if name not in others]


def figure_files(wildcards):
    """The tables that a figure shows, and the certificate where it names operating points."""
    entry = FIGURES[wildcards.figure]
    files = {
        table: f"<results>/{'' if table in LARGE_TABLES else 'tables/'}{table}.parquet"
        for table in entry.tables
    }
    if any(argument.startswith("operating_point") for argument in entry.arguments):
        files["points"] = "<results>/models/certificate.json"
    return files


def figure_digest(name):
    """Digest of the code that draws one figure, of its entry in the registry and of the plot style."""
    entry = FIGURES[name]
    parts = [
        library("draw_figure", {"figures.FIGURES": name}),
        known_digests.get(
            f"{entry.module}.{entry.function}",
            lambda: definition_digest(entry.module, entry.function),
        ),
        data_digest("kvguard.mplstyle"),
    ]
    return digest(parts)


def captions():
    """Texts beside the report's figures and tables."""
    return sorted((FOLDER / "reports" / "captions").glob("*.rst"))


def every_table(suffix):
    """Paths of all tables that the run's rules write."""
    return [f"<results>/tables/{name}.{suffix}" for name in run_tables()]


def run_tables():
    """Names of the tables that this run has: without training those of `UNTRAINED_TABLES`."""
    priced = bool(experiment.live.certify_prices)
    names = [name for name in TABLES if priced or name not in PRICE_TABLES]
    if experiment.imports_models:
        return ["imported_models", *(name for name in names if name in UNTRAINED_TABLES)]
    return [name for name in names if name != "imported_models"]


def run_figures():
    """Names of the figures whose tables this run has."""
    known = {*run_tables(), *trained(LARGE_TABLES)}
    compared = ("simulation_gap",) if experiment.imports_models else ()
    return [
        name
        for name, entry in FIGURES.items()
        if set(entry.tables) <= known and name not in compared
    ]


def table_report(name):
    """A table's CSV as an entry of the report."""
    return report(
        f"<results>/tables/{name}.csv",
        caption="../reports/captions/table.rst",
        category="Tables",
        subcategory=TABLES[name],
        labels={"table": name.replace("_", " ")},
    )


def planned_jobs():
    """Every job of this run's plan that writes files, and what has become of it."""
    plan, failed = workflow.dag, set()
    for job in workflow.scheduler.failed:
        failed.update(job.jobs if job.is_group() else [job])
    for job in plan.jobs:
        if not plan.needrun(job):
            state = "reused"
        elif plan.finished(job):
            state = "ran"
        else:
            state = "failed" if job in failed else "left"
        if job.output:
            files = [[str(path) for path in paths] for paths in (job.output, job.log)]
            yield PlannedJob(rule_of_block(job.rule.name), dict(job.wildcards_dict), *files, state)


def record_plan():
    """Keep what this run sets out to do where `kvguard status` finds it."""
    write_plan(experiment.results_dir, planned_jobs(), plan_digest(experiment))


def warn_of_unrecorded():
    """Say which results Snakemake takes for fresh only because it has no record of them.

    Without its records (`.snakemake/metadata`), as in a copied results folder, it goes by times
    alone. The files say themselves what made them.
    """
    stale = {}
    for job in workflow.dag.jobs:
        if workflow.dag.needrun(job) or workflow.persistence.has_metadata(job):
            continue
        made = [str(path) for path in job.output if made_otherwise(path, job.params)]
        if made:
            stale.setdefault(job.rule.name, []).extend(made)
    for rule, paths in stale.items():
        logger.warning(
            f"{rule}: {len(paths)} files were made by other parameters or code, such as {paths[0]}; "
            f"Snakemake has no record of them and takes them for fresh. `--forcerun {rule}` makes "
            f"them anew, with what depends on them"
        )


def log_summary():
    """Say at the end what ran, what was reused, and what failed and where its log is."""
    for line in run_summary(planned_jobs()):
        logger.info(line)


LARGE_TABLES = ("timeline", "outcomes", "simulation", "predictions", "splits")
"""Tables that lie in the results folder itself."""

TABLES = {
    "condition_summary": "Failures",
    "failure_kinds": "Failures",
    "harm": "Failures",
    "excess": "Failures",
    "onsets": "Failures",
    "sensitivity": "Failures",
    "errors": "Failures",
    "compression_check": "Failures",
    "imported_models": "Predictor",
    "training": "Predictor",
    "search_trials": "Predictor",
    "harm_metrics": "Predictor",
    "predictor_metrics": "Predictor",
    "predictor_curves": "Predictor",
    "lead_times": "Predictor",
    "detection": "Predictor",
    "ablation": "Predictor",
    "feature_importance": "Predictor",
    "formulation": "Predictor",
    "controls": "Predictor",
    "leave_one_out": "Predictor",
    "transfer": "Predictor",
    "certificate": "Controller",
    "certificate_grid": "Controller",
    "operating_points": "Controller",
    "pareto": "Controller",
    "simulability": "Controller",
    "policies": "Live",
    "policies_pooled": "Live",
    "policy_tests": "Live",
    "guard_tests": "Live",
    "planned_tests": "Live",
    "simulation_reasons": "Live",
    "memory": "Live",
    "price_certificate": "Live",
    "leakage_check": "Checks",
    "leakage_check_evaluation": "Checks",
    "leakage_check_ablation": "Checks",
    "leakage_check_leave_one_out": "Checks",
    "leakage_check_calibration": "Checks",
    "leakage_check_price": "Checks",
}
"""Tables and their place in the report; all hold plain columns and are written as CSV too."""

PRICE_TABLES = ("price_certificate", "leakage_check_price")
"""Tables of runs that certify prices."""

UNTRAINED_TABLES = {
    *("policies", "policies_pooled", "policy_tests", "guard_tests", "planned_tests"),
    *PRICE_TABLES,
}
"""Tables of a run that uses another one's models."""
