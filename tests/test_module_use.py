"""The workflow as a module of another project, with a configuration and rules of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import CHECKOUT, share_code_digests
from tiny_experiment import EXPERIMENT

from kvguard.config import load_config
from kvguard.splits import check_split_sizes

SNAKEFILE = f"""
configfile: "settings.yaml"

module kvguard:
    snakefile: "{CHECKOUT / "Snakefile"}"
    config: config["kvguard"]

use rule * from kvguard as kvguard_*

rule conclude:
    default_target: True
    input:
        rules.kvguard_summarize_live.output.policies,
    output:
        "conclusion.txt",
    shell:
        "echo done > {{output}}"
"""


def test_another_project_plans_the_workflow_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    share_code_digests(tmp_path)
    experiment = EXPERIMENT | {"results_dir": "results/kvguard"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"kvguard": experiment}))
    (tmp_path / "tiny_model").mkdir()
    (tmp_path / "tiny_model" / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--resources", "gpu=1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    assert jobs["kvguard_generate"] == "6"  # two ratios and the baseline, two shards each
    assert jobs["conclude"] == "1"
    assert "results/kvguard/tables/policies.parquet" in done.stdout


def test_the_smallest_experiment_is_a_valid_one() -> None:
    config = load_config(CHECKOUT / "config.yaml", CHECKOUT / ".test" / "config.yaml")
    for task in config.tasks:
        check_split_sizes(task.name, task.num_prompts, config.splits)
    assert len(config.conditions) == 2
