# Everything goes through one virtual environment, made on first use from constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CORES ?= 2
RUNS ?= results
KILLS ?= 5
# Folder with GSM8K's test.jsonl and train.jsonl, for benchmarks; where there is none, they use
# gsm_symbolic alone.
GSM8K ?= ../shared/data/gsm8k
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Files in the order of tests/conftest.py, the longest first.
PARALLEL := --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder
SNAKEMAKE := $(BIN)/snakemake --resources gpu=1 --cores

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-kills test-slurm check fmt fmt-check lint typecheck figures phase2 status bench bench-quick findings docs schema envs clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY) ## the whole pipeline on config.yaml: figures, tables, results/report.html
	$(SNAKEMAKE) $(CORES)
	@echo "The report is results/report.html, the figures are in results/figures."

test: $(READY) ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-quick: $(READY) ## the tests that need neither the embedded model nor Snakemake, a few of each kind
	OMP_NUM_THREADS=1 KVGUARD_TEST_QUICK=1 $(BIN)/python -m pytest $(PARALLEL) -m "unit and not slow and not matrix"

test-kills: $(READY) ## a run killed again and again, compared with one that was not; KILLS=20 for the full form
	OMP_NUM_THREADS=1 KVGUARD_TEST_KILLS=$(KILLS) $(BIN)/python -m pytest -m slow tests/test_interruptions.py

test-slurm: $(READY) ## the workflow on a SLURM cluster of one node, installed and started for it
	$(BIN)/python -m pytest tests/slurm

check: fmt-check lint typecheck ## formatting, lint and types, changing nothing

fmt: $(READY) ## format Python and Snakemake files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile rules

fmt-check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules

lint: $(READY) ## ruff and snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/snakemake --lint

typecheck: $(READY) ## mypy --strict
	$(BIN)/mypy

figures: $(READY) ## redraw the figures from the tables
	$(SNAKEMAKE) $(CORES) figures

phase2: $(READY) ## the paper's experiment, on a machine with a GPU
	$(BIN)/snakemake --configfile experiments/paper.yaml --workflow-profile profiles/gpu paper

status: $(READY) ## what is done and what is left, per stage
	$(BIN)/kvguard status

bench: $(READY) ## every benchmark; writes results/bench/<claim>.json
	@set -e; for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script; done

# In the order of worth; minutes on 2 idle cores: 2, 2, 4, 14, 6, 9, 5, 1, 2, 8, 2.
bench-quick: $(READY) ## the benchmarks of the engine alone, about an hour on an idle machine
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/check.py --repeats 3 --minutes 2
	$(BIN)/python benchmarks/guard.py --sessions 3 2
	$(BIN)/python benchmarks/long_context.py --rounds 3 --minutes 14
	$(BIN)/python benchmarks/long_context.py --shared --rounds 3 --minutes 6 --policies always_safe \
		always_safe_copies none none_whole lossless_auto lossless_auto_whole guard_price guard_price_bus
	if [ -d "$(GSM8K)" ]; then \
		$(BIN)/python benchmarks/generation.py --only-compare --minutes 9 --gsm8k $(GSM8K); fi
	$(BIN)/python benchmarks/generation.py --only-compare --minutes 5
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/probes.py --repeats 3 --minutes 2
	$(BIN)/python benchmarks/acceptance.py --minutes 8
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/write_performance.py

findings: $(READY) ## docs/findings.md from the tables of finished runs: make findings RUNS="results ..."
	$(BIN)/kvguard findings $(addprefix --results-dir ,$(RUNS)) --output docs/findings.md --readme README.md

docs: $(READY) ## API pages from the docstrings: site/index.html
	$(BIN)/python docs/write_api.py site

schema: $(READY) ## write config.schema.json from the configuration's models
	$(BIN)/python -m kvguard.config_schema

envs: $(READY) ## write envs/*.yaml from the pins of pyproject.toml and constraints.txt
	$(BIN)/python envs/write_envs.py

clean: ## remove results and caches, keep the environment
	rm -rf results site .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
