"""Join every token with its text, its hazard and the mode of a controller that only watches."""

from pathlib import Path

import polars as pl
from transformers import AutoTokenizer

from kvguard import joblog
from kvguard.certificate import load_certificate
from kvguard.config import OperatingPoint
from kvguard.schema import PREDICTIONS, TIMELINE, read_table, write_table
from kvguard.timeline import build_timeline, token_texts


def main(
    checkpoints: dict[str, Path],
    tokens: list[Path],
    predictions_path: Path,
    controller: OperatingPoint,
    hazard_of: str,
    target: Path,
) -> None:
    """Write the timeline of every request; ``checkpoints`` go by the models' names.

    ``hazard_of`` is the predictor's target: the one that the thresholds belong to.
    """
    columns = [name for name in TIMELINE if name not in ("token_text", "hazard", "mode")]
    rows = pl.scan_parquet(tokens, hive_partitioning=False).select(columns)
    predictions = read_table(predictions_path, PREDICTIONS)
    parts = []
    for model, checkpoint in checkpoints.items():
        own = rows.filter(pl.col("model") == model).collect()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        texts = token_texts(tokenizer, own["token_id"])
        parts.append(build_timeline(own, texts, predictions, controller, target=hazard_of))
    write_table(pl.concat(parts), target, TIMELINE)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    source, params = snakemake.input, snakemake.params
    certificate = load_certificate(Path(source.certificate))
    main(
        dict(zip(params.models, map(Path, source.checkpoints), strict=True)),
        [Path(path) for path in source.tokens],
        Path(source.predictions),
        certificate.operating_point(params.operating_point),
        certificate.target,
        Path(snakemake.output.timeline),
    )
