"""Draw the prompts and the few-shot examples of every task."""

from pathlib import Path

from pydantic import TypeAdapter

from kvguard import joblog
from kvguard.config import Task
from kvguard.prompts import load_tasks, prompts_frame, write_examples
from kvguard.schema import PROMPTS, write_table


def main(tasks: list[Task], seed: int, prompts_path: Path, examples_path: Path) -> None:
    """Write the prompts table and the few-shot examples."""
    prompts, examples = load_tasks(tasks, seed)
    write_examples(examples_path, examples)
    write_table(prompts_frame(prompts), prompts_path, PROMPTS)


if __name__ == "__main__":
    snakemake = joblog.start_job()
    main(
        TypeAdapter(list[Task]).validate_python(snakemake.params.tasks),
        snakemake.params.seed,
        Path(snakemake.output.prompts),
        Path(snakemake.output.examples),
    )
