# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-quick check docs perf perf-accept clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[train,grib,dev]"
	touch $@

demo: .venv/.installed  ## make datasets, cut, verify, plot and load them, train a model on 2 ranks, forecast with it; all in demo/
	rm -rf demo
	mkdir demo
	$(BIN)/shardio synth demo/o96.zarr --grid o96 --dates 8 --grid-chunks 1
	$(BIN)/shardio rechunk demo/o96.zarr demo/o96-16.zarr --grid-chunks 16
	$(BIN)/shardio verify demo/o96-16.zarr --source demo/o96.zarr
	$(BIN)/shardio info demo/o96-16.zarr --ranks 4
	$(BIN)/shardio plot demo/o96-16.zarr --variable t --output demo/grid-chunks.png
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 docs/examples/train_plain_torch.py demo/o96-16.zarr
	$(BIN)/shardio synth demo/o32.zarr --grid o32 --dates 200 --grid-chunks 4
	$(BIN)/trainer fit --config trainer/cli/configs/demo.yaml --data.dataset demo/o32.zarr --output demo/run
	$(BIN)/trainer validate --config trainer/cli/configs/demo.yaml --data.dataset demo/o32.zarr --output demo/run \
		--ckpt_path demo/run/checkpoints/last.ckpt
	$(BIN)/trainer predict --config trainer/cli/configs/demo.yaml --dataset demo/o32.zarr --output demo/forecasts \
		--ckpt_path demo/run/checkpoints/last.ckpt --start 2020-02-10 --lead-time 120h --evaluate

test: check  ## all checks, then all tests, on two processes
	$(BIN)/pytest -n 2 --dist loadfile

test-quick: .venv/.installed  ## tests that start no other process: a part of them, in under 3 minutes
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

check: .venv/.installed docs  ## lint, format, types, import rules, shell scripts, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/shellcheck tools/slurm/*.sbatch

docs: .venv/.installed  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

perf: .venv/.installed  ## count and time every kind of work; fails if bytes, messages, memory or FLOPs grew
	$(BIN)/python -m tools.perf

perf-accept: .venv/.installed  ## take the counters of the last make perf as the baseline
	$(BIN)/python -m tools.perf --accept

clean:  ## remove everything that make made
	rm -rf .venv demo site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
