# `make help` lists what there is. Everything runs in .venv, which the first call creates.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)/src
export MLFLOW_DISABLE_TELEMETRY := true
PORT ?= 5000

.DEFAULT_GOAL := help
.PHONY: help setup run weights test test-slow test-all lint tune tune-apply ui sync serve promote report bench bench-quality clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

setup:  ## create .venv and install the pinned packages (the other targets do this by themselves)
	@$(PYTHON) bootstrap.py

run: setup  ## the whole pipeline: download, prepare, train, sample, evaluate, report
	@dvc repro
	@dvc metrics show
	@echo "Pictures and scores: report/index.html   Runs: make ui"

test: setup  ## the quick tests, which cover everything once (minutes)
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: setup  ## the rest: more kills, more servers, longer trainings
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-all: setup  ## both
	@$(BIN)/python -m pytest $(ARGS)

lint: setup  ## style, types, and that imports between rooms point down
	@ruff check . && ruff format --check . && mypy && lint-imports --no-logo

tune: setup  ## search learning rate and schedules with Optuna: make tune [STORAGE=postgresql://...]
	@$(BIN)/python -m stages.tune
ifneq ($(value STORAGE),)
export OPTUNA_STORAGE = $(value STORAGE)
endif

tune-apply: setup  ## write what the search found into params.yaml and show the difference
	@$(BIN)/python -m diffusion tune-apply

ui: setup  ## compare runs in MLflow's pages: make ui [PORT=5000]
	@$(BIN)/python -m diffusion ui --port $(PORT)

sync: setup  ## send MLflow what it missed while it was away
	@$(BIN)/python -m diffusion sync

serve: setup  ## answer HTTP requests with the champion: make serve [PORT=5001]
	@$(BIN)/python -m diffusion serve $(if $(filter command line environment,$(origin PORT)),--port $(PORT))

promote: setup  ## list the registered models; make promote VERSION=n makes that one the champion
	@$(BIN)/python -m diffusion promote $(VERSION)

weights: setup  ## look again for the weights of FID's network, and say what changed
	@dvc repro --force --single-item weights

report: setup  ## draw the report page from what the pipeline made
	@dvc repro report

bench: setup  ## measure quality and speed, ours and peers', more than an hour (writes benchmarks/results/)
	@dvc repro prepare reference
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@for name in group_norm malloc precision laptop_quality train_speed sample_speed overheads tracking_cost tune_overhead \
		inception_speed fid_parity data_scale time_to_quality; do \
		$(BIN)/python benchmarks/$$name.py || exit; done

bench-quality: setup  ## solvers, objectives and classes compared by their samples, about three hours
	@dvc repro train reference
	@for name in solvers objectives classes; do $(BIN)/python benchmarks/$$name.py || exit; done

clean:  ## remove checkpoints and journals (first `make sync`), downloads and the virtual environment; DVC's cache and MLflow's store stay
	rm -rf .venv runs data/downloads
