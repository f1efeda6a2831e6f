"""The experiment behind a command: configuration layers, overlays, and Snakemake's view of them.

Nothing about the layout of the results is repeated here: for a run's status Snakemake plans it
twice, once as if nothing existed and once for what is missing or out of date.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from kvguard.blocks import rule_of_block
from kvguard.config import (
    BASELINE_RATIO,
    Config,
    ConfigError,
    Press,
    load_config,
    overlay,
    parse_config,
    ratio_text,
)

CONFIG_NAME = "config.yaml"
PAPER_CONFIG = "experiments/paper.yaml"

TARGETS = ("all", "figures", "paper")
"""Rules that only gather files."""


def workflow_folder() -> Path:
    """The folder that holds the Snakefile: the checkout, or what the wheel installed.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).parent
    for folder in (package / "checkout", package.parent):
        if (folder / "Snakefile").is_file() and (folder / "workflow_scripts").is_dir():
            return folder
    raise ConfigError(f"the workflow's files are not beside {package}; install kvguard again")


def shipped(path: str | Path) -> Path:
    """A path as given where it exists, else the file of that name that comes with the workflow."""
    path = Path(path)
    beside = workflow_folder() / path
    return beside if not path.exists() and beside.exists() else path


def config_layers(config: Sequence[Path] | None) -> list[Path]:
    """Configuration files in order: the default, then what the user lays over it.

    The default is ``config.yaml`` of the current directory, or the one that comes with kvguard.
    """
    default = shipped(CONFIG_NAME)
    return [default, *(shipped(path) for path in config or () if path != Path(CONFIG_NAME))]


def workflow_profile(name: str) -> Path:
    """The folder of a Snakemake workflow profile.

    Args:
        name: a folder with a ``config.yaml``, or the name of one of the workflow's own.

    Raises:
        ConfigError: there is no such profile; lists the workflow's own.
    """
    own = workflow_folder() / "profiles"
    for folder in (Path(name), own / Path(name).name):
        if (folder / "config.yaml").is_file():
            return folder
    known = sorted(path.parent.name for path in own.glob("*/config.yaml"))
    raise ConfigError(
        f"--profile: no profile {name!r}; give one of {', '.join(known)}, or a folder with a "
        "config.yaml for Snakemake"
    )


def recorded_config(results_dir: Path) -> Config:
    """The configuration that a run recorded in its results.

    The files that it names by path, such as a model's GGUF, need not be there any more.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = results_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: {results_dir} holds no run; `snakemake` makes one, or give --config"
        )
    return load_config(path, check_files=False)


def press_experiment(
    layers: Sequence[Path],
    press: str,
    ratio: str,
    num_prompts: int,
    task: str | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
) -> Config:
    """The experiment of one task under one press at one ratio.

    Args:
        layers: configuration files.
        press: a name in the configuration, a kvpress class, or its short form ("streaming_llm").
        ratio: fraction of entries to remove; 0 runs the model uncompressed.
        num_prompts: how many.
        task: a name in the configuration; None takes its first task.
        max_new_tokens: None keeps the configuration's.
        seed: None keeps the configuration's.

    Raises:
        ConfigError: names the value and what is accepted.
    """
    base = load_config(*layers)
    try:
        wanted = ratio_text(ratio)
    except ValueError as error:
        raise ConfigError(f"--compression-ratio: {error}") from None
    entry = press_entry(base, press)
    # A ratio of 0 is the uncompressed run; the press entry needs some ratio to be valid.
    entry["ratios"] = [wanted if wanted != BASELINE_RATIO else "0.500"]
    entry["live_ratios"] = None  # those of the configuration need not hold this ratio
    generation: dict[str, Any] = {"shard_size": num_prompts}
    asked: dict[str, Any] = {"num_prompts": num_prompts}
    if max_new_tokens is not None:
        generation["max_new_tokens"] = asked["max_new_tokens"] = max_new_tokens
    over: dict[str, Any] = {
        "tasks": [_task_entry(base, task) | asked],
        "presses": [entry],
        "generation": generation,
        "live": {"conditions": []},
    }
    if seed is not None:
        over["seed"] = seed
    return parse_config(overlay(base.model_dump(mode="json", by_alias=True), over))


def _task_entry(base: Config, name: str | None) -> dict[str, Any]:
    """The configuration entry of a task; the first one when no name is given."""
    try:
        task = base.tasks[0] if name is None else base.task(name)
    except KeyError as error:
        raise ConfigError(f"--task: {error.args[0]}") from None
    return task.model_dump(mode="json")


def press_entry(base: Config, name: str) -> dict[str, Any]:
    """The configuration entry of a press, by its name there or by its class.

    Raises:
        ConfigError: there is no such press; names close ones.
    """
    import difflib

    from kvguard import press_catalogue

    known = {press.name: press for press in base.presses}
    if name in known:
        return known[name].model_dump(mode="json", by_alias=True)
    classes = {short_name(cls): cls for cls in press_catalogue.press_classes()}
    wanted = short_name(name)
    for press in base.presses:
        if short_name(press.press_class) == wanted:
            return press.model_dump(mode="json", by_alias=True)
    if wanted not in classes:
        supported = set(classes.values()) - set(press_catalogue.REFUSED)
        named = {short_name(press) for press in known}
        spoken = {snake_name(cls) for cls in supported if short_name(cls) not in named}
        near = difflib.get_close_matches(name, sorted(spoken | set(known)), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"--press: there is no press {name!r}{hint}\n"
            f"known: {', '.join(sorted(spoken | set(known)))}"
        )
    return {"name": snake_name(classes[wanted]), "class": classes[wanted], "kwargs": {}}


def short_name(name: str) -> str:
    """A press's name without case, underscores and the ending: "StreamingLLMPress" and
    "streaming_llm" are both "streamingllm"."""
    return name.replace("_", "").replace("-", "").lower().removesuffix("press")


def snake_name(press_class: str) -> str:
    """A press class as it is typed on the command line: "StreamingLLMPress" -> "streaming_llm"."""
    stem = press_class.removesuffix("Press")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()


def sweep_overlay(
    layers: Sequence[Path],
    num_prompts: int | None,
    model: str | None,
    revision: str | None,
    results_dir: str | None,
) -> dict[str, Any]:
    """What a sweep changes in its configuration.

    A model or a number of prompts that the configuration does not have gets a results folder of its
    own, so that a sweep never mixes with another run's results.

    Raises:
        ConfigError: the model is unknown and no revision is given.
    """
    base = load_config(*layers)
    over: dict[str, Any] = {}
    name = base.models[0].name
    if num_prompts is not None:
        over["tasks"] = [
            _task_entry(base, task.name) | {"num_prompts": num_prompts} for task in base.tasks
        ]
    if model is not None:
        entry = model_entry(base, model, revision)
        name = entry["name"]
        over["models"] = [entry]
    if results_dir is not None:
        over["results_dir"] = results_dir
    elif over:
        over["results_dir"] = f"{base.results_dir}/sweeps/{name}-{num_prompts or 'default'}"
    return over


def model_entry(base: Config, model: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration entry of a model, from this configuration, the paper's, or the hub.

    Args:
        base: the configuration.
        model: a name in a configuration, or a hub id ``owner/name``.
        revision: a full commit hash; needed for a hub id that no configuration pins.

    Raises:
        ConfigError: says what to give.
    """
    pinned = list(base.models)
    pinned += load_config(*config_layers([Path(PAPER_CONFIG)])).models
    for entry in pinned:
        if model in (entry.name, getattr(entry, "repository", None)):
            found = entry.model_dump(mode="json")
            return found | ({"revision": revision} if revision else {})
    names = sorted({e.name for e in pinned} | {getattr(e, "repository", e.name) for e in pinned})
    if "/" not in model:
        raise ConfigError(
            f"--model: no model {model!r}; give one of {', '.join(names)}, or a hub id owner/name"
        )
    if revision is None:
        raise ConfigError(
            f"--model: {model!r} is pinned by no configuration; add --revision with the full "
            f"commit hash (40 hexadecimal digits) shown on its hub page. Pinned: {', '.join(names)}"
        )
    return {
        "name": model.split("/")[1].lower(),
        "source": "hub",
        "repository": model,
        "revision": revision,
    }


def certificate_uses(experiment: Config) -> list[dict[str, Any]]:
    """What the certificate's statements are bound to, without the models' digests."""
    return [
        {
            "model": model.name,
            **_press_use(press),
            "ratio": ratio,
            "task": task.name,
            "max_new_tokens": experiment.max_new_tokens(task.name),
            "decoding": experiment.generation.text,
            "check_every_tokens": experiment.guard.check_every_tokens,
            "recovery": recovery,
        }
        for model in experiment.models
        for press in experiment.presses
        for ratio in press.ratios
        for task in experiment.tasks
        for recovery in experiment.certificate.recoveries
    ]


def _press_use(press: Press) -> dict[str, Any]:
    """What a use records of a press, but its ratio."""
    fields = {"kwargs", "interval_tokens", "buffer_tokens"}
    return {
        "press": press.name,
        "press_class": press.press_class,
        "phase": press.phase,
        "press_settings": press.model_dump(
            mode="json", include={"kwargs"} if press.phase == "prefill" else fields
        ),
    }


def price_uses(experiment: Config) -> list[dict[str, Any]]:
    """What statements about prices are bound to, without the models' digests."""
    guard = experiment.guard
    return [
        {
            "model": model.name,
            **_press_use(experiment.press(press)),
            "ratio": ratio,
            "tasks": {one.name: experiment.max_new_tokens(one.name) for one in experiment.tasks},
            "decoding": experiment.generation.text,
            "bus_ratio": guard.bus_ratio,
            "margin_nats": guard.margin_nats,
            "cold": guard.cold,
            "safe_ratio": float(guard.safe_ratio),
            "batch_size": experiment.generation.batch_size,
        }
        for model in experiment.models
        for press, ratio in experiment.live_conditions
    ]


class StageStatus(NamedTuple):
    """Jobs of one rule."""

    rule: str
    done: int
    left: int


def snakemake_command(
    configs: Sequence[str | Path], *arguments: str, overrides: Sequence[str] = ()
) -> list[str]:
    """The command line that runs this Python's Snakemake on a stack of configuration files.

    Args:
        configs: configuration files, later ones laid over earlier ones.
        arguments: targets first, then options: some of Snakemake's take every word that follows.
        overrides: ``key=value`` pairs, laid over all files.

    Raises:
        ModuleNotFoundError: Snakemake is not installed.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise ModuleNotFoundError("No module named 'snakemake'", name="snakemake")
    snakefile = str(workflow_folder() / "Snakefile")
    command = [sys.executable, "-m", "snakemake", *arguments, "--snakefile", snakefile]
    command += ["--configfile", *map(str, configs)] if configs else []
    return command + (["--config", *overrides] if overrides else [])


def stale_lock(
    configs: Sequence[str | Path], overrides: Sequence[str] = (), folder: str | Path = "."
) -> str | None:
    """What to tell a user whose folder is locked by a Snakemake that no longer runs.

    Args:
        configs: configuration files, as `snakemake_command` takes them.
        overrides: ``key=value`` pairs, laid over all files.
        folder: in which Snakemake runs.

    Returns:
        The message with the command that clears the lock; None where there is no lock, or a
        Snakemake runs in the folder.
    """
    folder = Path(folder).resolve()
    if not any((folder / ".snakemake/locks").glob("*.lock")):
        return None
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and any("snakemake" in w for w in process.cmdline()):
                return None
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's
    command = shlex.join(snakemake_command(configs, "--unlock", overrides=overrides))
    return (
        f"{folder} is locked by a Snakemake that no longer runs on this machine. If none runs "
        f"there from another machine either, clear the lock with\n{command}"
    )


def run_status(configs: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[StageStatus]:
    """Done and left jobs per rule, in the order in which they run.

    Args:
        configs: configuration files, as `snakemake_command` takes them.
        overrides: ``key=value`` pairs, laid over all files.

    Raises:
        ConfigError: Snakemake cannot plan the run; the message is Snakemake's.
    """
    every = _planned_jobs(configs, overrides, "--forceall")
    left = _planned_jobs(configs, overrides)
    return [
        StageStatus(rule, count - left.get(rule, 0), left.get(rule, 0))
        for rule, count in every.items()
        if rule not in TARGETS
    ]


def _planned_jobs(
    configs: Sequence[str | Path], overrides: Sequence[str], *arguments: str
) -> dict[str, int]:
    """Number of jobs per rule that Snakemake would run, by first appearance in its plan.

    A block is one job of the rule whose shards it makes.
    """
    command = snakemake_command(
        configs, "--dry-run", "--nolock", "--cores", "1", *arguments, overrides=overrides
    )
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise ConfigError(output.strip())
    table = re.search(r"^Job stats:\njob .*\n-+ .*\n((?:\S+ +\d+\n)+)", output, re.MULTILINE)
    if table is None:
        return {}
    jobs = {name: int(count) for name, count in map(str.split, table[1].splitlines())}
    counts: dict[str, int] = {}
    for name in dict.fromkeys(re.findall(r"^(?:local)?rule (\w+):", output, re.MULTILINE)):
        rule = rule_of_block(name)
        counts[rule] = counts.get(rule, 0) + jobs.get(name, 0)
    return {rule: count for rule, count in counts.items() if count}
