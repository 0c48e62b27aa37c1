# Each target makes .venv by itself when it is missing or older than the lock. Needs Python 3.11: make PYTHON=/path/to/python3.11
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
# Test files at a time; 0: one after the other, in this process.
WORKERS ?= 2
BENCHMARKS := $(wildcard tests/benchmarks/bench_*.py)
STUDY := lr_by_rank placement alpha batch_size

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart study test lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## create .venv from requirements/cpu.txt (about 2 minutes)

quickstart: $(INSTALLED)  ## a real sweep over rank, alpha, learning rate and target modules, and its report (some minutes)
	$(BIN)/python -m harness.sweep recipes/quickstart.yaml

# A sweep that was stopped goes on; one that is complete is not run again.
study: $(INSTALLED)  ## the sweeps of recipes/lora_without_regret, one after the other (one to two hours), and docs/study from them
	@set -e; for name in $(STUDY); do \
		if [ -e runs/study/$$name/manifest.json ]; then set -- --resume runs/study/$$name; \
		else set -- recipes/lora_without_regret/$$name.yaml trainer.ckpt_path=runs/study trainer.run_name=$$name; fi; \
		echo "== $$name"; $(BIN)/python -m harness.sweep "$$@" --confirm 2; \
	done
	$(BIN)/python -m harness.report $(STUDY:%=runs/study/%) --output docs/study

test: $(INSTALLED)  ## all tests, two files at a time; PYTEST_ARGS="-m 'not heavy'" leaves out those that start vLLM or Ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)  ## style, formatting, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(INSTALLED)  ## every benchmark in tests/benchmarks, one after the other, and their page docs/benchmarks/README.md
	@test -n "$(BENCHMARKS)" || { echo "error: there is no tests/benchmarks/bench_*.py" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python -m tests.benchmarks.$$(basename $$script .py); done
	$(BIN)/python -m tests.benchmarks.summarize

clean:  ## remove .venv, build output and caches; runs/ stays
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so that an interrupted install starts again.
$(INSTALLED): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.11, which the lock is for; fix: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing $$(grep -c == requirements/cpu.txt) packages into .venv: about 2 minutes, more when they are downloaded first"
	@rm -f $@
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --no-deps -r requirements/cpu.txt
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@$(BIN)/python requirements/check_install.py
	@touch $@
	@echo "Installed: $$($(BIN)/python --version), torch $$($(BIN)/python -c 'import torch; print(torch.__version__)')"
