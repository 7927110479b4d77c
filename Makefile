# `make help` lists what there is. Everything runs in .venv, which the first call creates.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
PORT ?= 5000

.DEFAULT_GOAL := help
.PHONY: help setup run test lint tune ui sync report bench bench-quality clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup:  ## create .venv and install the pinned packages (the other targets do this by themselves)
	@$(PYTHON) bootstrap.py

run: setup  ## the whole pipeline: download, prepare, train, sample, evaluate, report
	@dvc repro
	@dvc metrics show
	@echo "Pictures and scores: report/index.html   Runs: make ui"

test: setup  ## the test suite
	@$(BIN)/python -m pytest $(ARGS)

lint: setup  ## style and types
	@ruff check . && ruff format --check . && mypy

tune: setup  ## search learning rate and schedules with Optuna
	@$(BIN)/python -m stages.tune

ui: setup  ## compare runs in MLflow's pages: make ui [PORT=5000]
	@$(BIN)/python -m diffusion.ui --port $(PORT)

sync: setup  ## send MLflow what it missed while it was away
	@$(BIN)/python -m diffusion.sync

report: setup  ## draw the report page from what the pipeline made
	@dvc repro report

bench: setup  ## measure quality and speed, ours and peers', about 55 minutes (writes benchmarks/results/)
	@dvc repro prepare
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@for name in laptop_quality train_speed sample_speed overheads data_scale time_to_quality inception_speed; do \
		$(BIN)/python benchmarks/$$name.py || exit; done

bench-quality: setup  ## solvers, objectives and classes compared by their samples, about three hours
	@dvc repro train
	@for name in solvers objectives classes; do $(BIN)/python benchmarks/$$name.py || exit; done

clean:  ## remove checkpoints, downloads and the virtual environment; DVC's cache and MLflow's store stay
	rm -rf .venv runs data/downloads
