"""Models that another run trained, for a run that trains none (``predictor.trained_by``).

`check_source` goes by the other run's configuration, before any job starts; `import_models` checks
the files themselves and the prompts of both runs, copies what the live policies read, and writes
`ORIGIN` beside the copies: which run, which manifest, which code, and where the models are used on
something that they were not trained on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import BaseModel, ConfigDict

from kvguard import schema
from kvguard.config import POLICIES, Config, ConfigError, parse_config
from kvguard.files import RECORD, DamagedFile, check_file, file_sha256, origin_of, recorded_digest

ORIGIN = "origin.json"
"""Name of the record in the folder ``models``."""

MANIFEST = "manifest.json"

READ_BY = {
    "harm_model.json": ("guard_price",),
    "rivals.json": ("clock_or_loop", "gate", "ladder"),
    "baselines.json": ("gate", "ladder"),
    "hazard_predictor.json": tuple(name for name, entry in POLICIES.items() if entry.needs_hazard),
    "certificate.json": tuple(name for name, entry in POLICIES.items() if entry.needs_hazard),
}
"""Files of the folder ``models`` and the policies that read each; the certificate for its
thresholds."""


class ImportedModelsError(ValueError):
    """Another run's models that this run cannot use; says what is wrong and what would do."""


class ImportedFile(BaseModel):
    """One model: SHA-256 of the other run's file, digest of the code that trained it, if known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    code: str | None


class Origin(BaseModel):
    """Where a run's models come from.

    Attributes:
        run: name of the run that trained.
        results_dir: its folder, as the configuration names it.
        manifest_sha256: of its manifest.
        kvguard, commit: version of the package and commit of the code that it started with.
        seed: of its configuration.
        files: by name in the folder ``models``.
        train_prompts, calibration_prompts: of the run that trained; none is a prompt of this run.
        tested_there: prompts of this run that were test prompts of that one.
        shared_templates: templates of this run's prompts from which prompts that trained or
            calibrated were drawn as well.
        transfer: what the models are used on here and were not trained on; none: nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    run: str
    results_dir: str
    manifest_sha256: str
    kvguard: str | None
    commit: str | None
    seed: int
    files: dict[str, ImportedFile]
    train_prompts: int
    calibration_prompts: int
    tested_there: int
    shared_templates: int
    transfer: tuple[str, ...]

    @property
    def text(self) -> str:
        """The record in sentences."""
        names = ", ".join(f"`{name}`" for name in self.files)
        told = (
            f"Models ({names or 'none are needed'}) come from the run `{self.run}` "
            f"(manifest {self.manifest_sha256[:16]}, seed {self.seed}), which trained on "
            f"{self.train_prompts} prompts and calibrated on {self.calibration_prompts}; none of "
            "them is a prompt of this run."
        )
        if self.tested_there:
            told += f" {self.tested_there} prompts of this run were test prompts there."
        if self.shared_templates:
            told += f" Templates that this run's prompts share with those: {self.shared_templates}."
        if self.transfer:
            told += f" **Transfer**, not what they were trained on: {'; '.join(self.transfer)}."
        return told


class Source(NamedTuple):
    """A finished run: its folder and its configuration."""

    folder: Path
    config: Config


def needed_files(config: Config) -> dict[str, list[str]]:
    """Model files that the live policies read, each with those that do."""
    certified = ["guard_price"] if config.live.certify_prices else []
    asked = list(dict.fromkeys([*config.live.policies, *certified]))
    found = {name: [one for one in asked if one in readers] for name, readers in READ_BY.items()}
    return {name: readers for name, readers in found.items() if readers}


def check_source(config: Config) -> Source:
    """The run that ``predictor.trained_by`` names, if its configuration can serve this one.

    Raises:
        ConfigError: no finished run is there, it uses another run's models itself, lacks a model
            that a policy reads, or has a press of the same name with other settings.
    """
    folder = Path(str(config.predictor.trained_by))
    for name in ("config.json", MANIFEST):
        if not (folder / name).is_file():
            raise _refused(f"results of a finished run, which end with {MANIFEST}; no {name} there")
    source = Source(folder, parse_config(_json(folder / "config.json"), check_files=False))
    trained_by = source.config.predictor.trained_by
    if trained_by is not None:
        raise _refused(f"a run that trains; {folder} uses the models of {trained_by}: name that")
    for name, readers in needed_files(config).items():
        if not (folder / "models" / name).is_file():
            raise ConfigError(
                f"live.policies: {', '.join(readers)} read models/{name}, which {folder} "
                "(predictor.trained_by) does not have; run that one with such a policy, or leave "
                "it out here"
            )
    theirs = {press.name: press for press in source.config.presses}
    chosen = {"press_class", "kwargs", "phase"}
    for press in config.presses:
        fields = chosen | (set() if press.phase == "prefill" else {"interval_tokens"})
        own = press.model_dump(include=fields)
        if press.name in theirs and theirs[press.name].model_dump(include=fields) != own:
            raise ConfigError(
                f"presses: {press.name} is {own} here and "
                f"{theirs[press.name].model_dump(include=fields)} in {folder} "
                "(predictor.trained_by); give it those settings or another name"
            )
    missing = _missing_settings(config, source)
    if missing:
        raise ConfigError(
            f"live.conditions: {', '.join(needed_files(config)['rivals.json'])} need "
            f"thresholds of each, and {folder} (predictor.trained_by) did not run "
            f"{', '.join(missing)}"
        )
    return source


def _missing_settings(config: Config, source: Source) -> list[str]:
    """Live conditions for which the other run chose no thresholds, where policies need them."""
    if "rivals.json" not in needed_files(config):
        return []
    known = set(source.config.conditions)
    return [
        f"{press} {ratio}" for press, ratio in config.live_conditions if (press, ratio) not in known
    ]


def _refused(accepted: str) -> ConfigError:
    return ConfigError(f"predictor.trained_by: should name {accepted}")


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def source_digest(config: Config) -> str:
    """SHA-256 of the manifest of the run that trained: another one is another run.

    Of a run that imported its models already and whose source is gone, that of its record: it can
    still be planned.

    Raises:
        ConfigError: as `check_source`.
    """
    folder = str(config.predictor.trained_by)
    if not Path(folder).exists():
        origin = read_origin(Path(config.results_dir) / "models")
        if origin is not None and origin.results_dir == folder:
            return origin.manifest_sha256
    check_source(config)
    return file_sha256(Path(folder) / MANIFEST)


def import_models(
    config: Config,
    prompts: pl.DataFrame,
    checkpoints: Mapping[str, Path],
    target: Path,
) -> Origin:
    """Copy the models that the live policies read, and `ORIGIN`, if this run may use them.

    Args:
        config: of this run: ``models``, ``tasks``, ``presses``, and what is needed of
            ``generation``, ``predictor`` and ``live``.
        prompts: PROMPTS of this run.
        checkpoints: by model, the prepared models of this run.
        target: folder of the copies.

    Raises:
        ConfigError: as `check_source`.
        ImportedModelsError: prompts of this run trained or calibrated there; says how many.
        DamagedFile: a file there is not what its run wrote.
        PredictorError, CertificateError, GuardError: a model is of other features or another
            format, or training had refused it.
    """
    source = check_source(config)
    folder, listed = source.folder, _json(source.folder / MANIFEST)
    names = list(needed_files(config))
    read = ["splits.parquet", "prompts/prompts.parquet", *(f"models/{name}" for name in names)]
    read += [f"checkpoints/{model.name}/{RECORD}" for model in source.config.models]
    for name in read:
        _check_recorded(folder, name, listed)
    splits = schema.read_table(folder / "splits.parquet", schema.SPLITS)
    theirs = schema.read_table(folder / "prompts/prompts.parquet", schema.PROMPTS)
    theirs = theirs.join(splits.select("prompt_id", "split"), on="prompt_id")
    _check_models(folder / "models", names)
    used = theirs.filter(pl.col("split") != "test")
    repeated = shared_prompts(prompts, used)
    if repeated:
        raise ImportedModelsError(
            f"predictor.trained_by: {repeated} of {prompts.height} prompts of this run trained or "
            f"calibrated the models of {folder}; draw others with another seed than "
            f"{source.config.seed}"
        )
    models = _same_models(source, checkpoints)
    for name in names:
        with schema.atomic_path(target / name) as temporary:
            if name == "rivals.json":
                temporary.write_text(_rivals(config, source, models))
            else:
                temporary.write_bytes((folder / "models" / name).read_bytes())
    begun = _json(folder / "provenance.json") if (folder / "provenance.json").is_file() else {}
    templates = [
        frame.select("task", "template").drop_nulls("template").unique()
        for frame in (prompts, used)
    ]
    origin = Origin(
        run=source.config.name,
        results_dir=str(config.predictor.trained_by),
        manifest_sha256=file_sha256(folder / MANIFEST),
        kvguard=begun.get("kvguard"),
        commit=begun.get("commit"),
        seed=source.config.seed,
        files={
            name: ImportedFile(
                sha256=file_sha256(folder / "models" / name),
                code=origin_of(folder / "models" / name).get("code"),
            )
            for name in names
        },
        train_prompts=theirs.filter(pl.col("split") == "train").height,
        calibration_prompts=theirs.filter(pl.col("split") == "calibration").height,
        tested_there=shared_prompts(prompts, theirs.filter(pl.col("split") == "test")),
        shared_templates=templates[0].join(templates[1], on=["task", "template"]).height,
        transfer=tuple(_transfer(config, source, models)),
    )
    with schema.atomic_path(target / ORIGIN) as temporary:
        temporary.write_text(json.dumps(origin.model_dump(mode="json"), indent=1) + "\n")
    return origin


def shared_prompts(prompts: pl.DataFrame, others: pl.DataFrame) -> int:
    """Prompts (PROMPTS) that are among others, by their identity or word for word."""
    known, texts = set(others["prompt_id"]), {_text(one) for one in others["question"]}
    return sum(
        one in known or _text(question) in texts
        for one, question in prompts.select("prompt_id", "question").iter_rows()
    )


def _text(question: str) -> str:
    """Digest of a question, whatever its task is called and however its words are spaced."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


def _check_recorded(folder: Path, name: str, listed: Mapping[str, Any]) -> None:
    """Raise where a file is not what the run wrote, by its own record and by the manifest."""
    path = folder / name
    if not path.is_file():
        raise ImportedModelsError(f"predictor.trained_by: {path} is missing; run it again")
    check_file(path)
    digest = listed[name]["sha256"] if name in listed else recorded_digest(path)
    if digest is None:
        raise ImportedModelsError(
            f"predictor.trained_by: neither {MANIFEST} nor a record beside it has the digest of "
            f"{path}; run it again"
        )
    if digest != file_sha256(path):
        raise DamagedFile(path, f"its content is not the one in {MANIFEST}")


def _check_models(folder: Path, names: Sequence[str]) -> None:
    """Read every model as a live job will; features and formats must be this package's."""
    from kvguard.certificate import load_certificate
    from kvguard.harm_model import load_harm_model
    from kvguard.predictor import load_predictor
    from kvguard.rival_settings import load_gate, load_rivals

    if "harm_model.json" in names:
        load_harm_model(folder / "harm_model.json")
    if "rivals.json" in names:
        load_rivals(folder / "rivals.json")
    if "baselines.json" in names:
        load_gate(folder / "baselines.json")
    if "hazard_predictor.json" in names:
        predictor = load_predictor(folder / "hazard_predictor.json")
        load_certificate(folder / "certificate.json").check_predictor(predictor)


def _same_models(source: Source, checkpoints: Mapping[str, Path]) -> dict[str, str | None]:
    """By model of this run: the name of the same weights and tokenizer there; None: not there."""
    theirs = {
        _json(source.folder / "checkpoints" / model.name / RECORD)["digest"]: model.name
        for model in source.config.models
    }
    return {
        name: theirs.get(_json(folder / RECORD)["digest"]) for name, folder in checkpoints.items()
    }


def _rivals(config: Config, source: Source, models: Mapping[str, str | None]) -> str:
    """The settings of the live conditions under this run's names of models.

    Raises:
        ImportedModelsError: a model is none of several that trained, so that it is not known whose
            thresholds it would get.
    """
    from kvguard.rival_settings import load_rivals

    known = load_rivals(source.folder / "models" / "rivals.json")
    entries = []
    for name, same in models.items():
        if same is None and len(source.config.models) > 1:
            there = ", ".join(model.name for model in source.config.models)
            raise ImportedModelsError(
                f"predictor.trained_by: whose thresholds {name} would get is not known: "
                f"{source.folder} has those of {there}; name a run with one model"
            )
        theirs = same or source.config.models[0].name
        for press, ratio in config.live_conditions:
            setting = known[theirs, press, ratio].model_copy(update={"model": name})
            entries.append(setting.model_dump(mode="json"))
    return json.dumps(entries, indent=1)


def _transfer(config: Config, source: Source, models: Mapping[str, str | None]) -> list[str]:
    """What the models were not trained on, in words."""
    there = source.config
    found = []
    for name, same in models.items():
        if same is None:
            trained = ", ".join(model.name for model in there.models)
            found.append(f"model {name} (trained on {trained})")
        elif config.model(name).dtype != there.model(same).dtype:
            types = config.model(name).dtype, there.model(same).dtype
            found.append(f"model {name} in {types[0]} (trained in {types[1]})")
    tasks = {task.name: task.model_dump(exclude={"num_prompts"}) for task in there.tasks}
    for task in config.tasks:
        ours, theirs = task.model_dump(exclude={"num_prompts"}), tasks.get(task.name)
        if theirs is None:
            found.append(f"task {task.name} (trained on {', '.join(tasks)})")
        elif ours != theirs:
            fields = [field for field in ours if ours[field] != theirs.get(field)]
            found.append(f"task {task.name} with other {', '.join(fields)}")
    ratios = {press.name: press.ratios for press in there.presses}
    for press, ratio in config.live_conditions:
        if press not in ratios:
            found.append(f"press {press} (trained on {', '.join(ratios)})")
        elif ratio not in ratios[press]:
            found.append(f"{press} {ratio} (trained at {', '.join(ratios[press])})")
    if config.generation.text != there.generation.text:
        found.append(f"{config.generation.text} (trained {there.generation.text})")
    return list(dict.fromkeys(found))


def read_origin(models: str | Path) -> Origin | None:
    """The record in a folder ``models``; None: the run trained its models itself.

    Raises:
        ImportedModelsError: the record cannot be read.
    """
    path = Path(models) / ORIGIN
    if not path.is_file():
        return None
    try:
        return Origin.model_validate_json(path.read_text())
    except ValueError as error:
        raise ImportedModelsError(f"{path} is not a record of imported models: {error}") from None


def trained_by(models: str | Path) -> str | None:
    """The run that trained imported models, in a few words; None: none were imported."""
    origin = read_origin(models)
    if origin is None:
        return None
    told = f"the run {origin.run} (manifest {origin.manifest_sha256[:16]})"
    return f"{told}, on something else than this use" if origin.transfer else told


def origin_table(origin: Origin) -> pl.DataFrame:
    """One row a model: its file, the run that trained it, digests, prompts, and any transfer."""
    return pl.DataFrame(
        [
            {
                "file": name,
                "trained_by": origin.run,
                "results_dir": origin.results_dir,
                "manifest_sha256": origin.manifest_sha256,
                "sha256": entry.sha256,
                "code": entry.code,
                "seed": origin.seed,
                "train_prompts": origin.train_prompts,
                "calibration_prompts": origin.calibration_prompts,
                "prompts_in_common": 0,
                "tested_there": origin.tested_there,
                "shared_templates": origin.shared_templates,
                "transfer": "; ".join(origin.transfer) or None,
            }
            for name, entry in origin.files.items()
        ],
        schema=_COLUMNS,
    )


_COLUMNS: dict[str, type[pl.DataType]] = {
    **dict.fromkeys(
        ("file", "trained_by", "results_dir", "manifest_sha256", "sha256", "code"), pl.String
    ),
    **dict.fromkeys(
        (
            *("seed", "train_prompts", "calibration_prompts"),
            *("prompts_in_common", "tested_there", "shared_templates"),
        ),
        pl.Int64,
    ),
    "transfer": pl.String,
}


def check_imported(config: Config, results: Path) -> Iterator[str | None]:
    """For `kvguard verify`: the copies are those of the run that the record names.

    Yields:
        None for a thing that is right, a sentence for one that is not.
    """
    origin = read_origin(results / "models")
    if config.predictor.trained_by is None:
        yield None if origin is None else f"models/{ORIGIN}: this run trained its models itself"
        return
    if origin is None:
        yield f"models/{ORIGIN}: no such file"
        return
    for name, entry in origin.files.items():
        path = results / "models" / name
        if not path.is_file():
            yield f"models/{name}: no such file"
        elif name == "rivals.json":  # names this run's models
            yield None
        else:
            same = file_sha256(path) == entry.sha256
            yield None if same else f"models/{name}: not the file that {origin.run} trained"
    manifest = Path(origin.results_dir) / MANIFEST
    if manifest.is_file():
        same = file_sha256(manifest) == origin.manifest_sha256
        yield None if same else f"models/{ORIGIN}: {manifest} is another one now"
