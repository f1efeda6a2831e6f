"""Tables of the simulation: the whole grid of thresholds, the operating points, what is known."""

from pathlib import Path

import polars as pl

from kvguard import joblog
from kvguard.certificate import load_certificate
from kvguard.config import Config, config_part
from kvguard.evaluate_controller import Frames, summarize_model
from kvguard.schema import RUNS, read_table, write_table
from kvguard.splits import prompts_of, read_splits


def main(
    experiment: Config,
    models: list[str],
    inputs: dict[str, list[Path]],
    targets: dict[str, Path],
) -> None:
    """Write the tables; inputs and targets go by the rule's names."""
    test = prompts_of(read_splits(inputs["splits"][0]), "test")
    simulated = read_table(inputs["simulation"][0], RUNS)
    certificate = load_certificate(inputs["certificate"][0])
    points = {str(name): point.operating_point for name, point in certificate.points.items()}
    results = []
    for model in models:
        wanted = (pl.col("model") == model) & pl.col("prompt_id").is_in(test)
        frames = Frames(
            *(
                pl.scan_parquet(inputs[name], hive_partitioning=False).filter(wanted).collect()
                for name in Frames._fields
            )
        )
        runs = simulated.filter(pl.col("model") == model)
        results.append(summarize_model(frames, runs, experiment, points, target=certificate.target))
    for name, target in targets.items():
        write_table(pl.concat([result[name] for result in results]), target)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    given = snakemake.input
    main(
        config_part(snakemake.params.experiment),
        snakemake.params.models,
        {
            name: [Path(path) for path in ([entry] if isinstance(entry, str) else entry)]
            for name, entry in given.items()
        },
        {name: Path(path) for name, path in snakemake.output.items()},
    )
