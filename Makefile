# expertmesh: `make serve` is all that a first look needs; `make help` lists the rest.

ifeq ($(filter else-if,$(.FEATURES)),)
$(error GNU make 3.81 or newer is needed)
endif

VENV := .venv
BIN := $(VENV)/bin
# Where the CPU build of torch comes from on a machine without an NVIDIA GPU, when it answers.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Arguments for `make serve` and `make bench`, for example ARGS="--port 8080".
ARGS ?=
PYTEST_ARGS ?=

INPUTS := pyproject.toml constraints.txt .ci/setup.py
INSTALL = python=$$(sh .ci/find-python.sh) && \
	"$$python" .ci/setup.py --venv $(VENV) --torch-cpu-index "$(TORCH_CPU_INDEX)"

.PHONY: help setup setup-test serve test lint types audit bench protos clean
.DEFAULT_GOAL := help

help:
	@echo "make setup    .venv with what serving needs"
	@echo "make serve    start a cluster and serve the bundled model (ARGS=\"--port 8080\")"
	@echo "make test     ruff, mypy, pytest (PYTEST_ARGS=\"-k name\")"
	@echo "make audit    look for known holes in the pinned packages"
	@echo "make bench    measure, and write benchmarks/RESULTS.md"
	@echo "make protos   generate the stubs in protos/"
	@echo "make clean    remove .venv and caches"

$(VENV)/.stamp-run: $(INPUTS)
	@$(INSTALL) run

$(VENV)/.stamp-test: $(INPUTS)
	@$(INSTALL) test

setup: $(VENV)/.stamp-run

setup-test: $(VENV)/.stamp-test

serve: $(VENV)/.stamp-run
	@EXPERTMESH_PARENT=$$PPID exec $(BIN)/expertmesh serve $(ARGS)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-test
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -m "not gpu and not slow" $(PYTEST_ARGS)

audit:
	@python=$$(sh .ci/find-python.sh) && "$$python" .ci/audit.py

bench: $(VENV)/.stamp-test
	$(BIN)/python -m benchmarks.run $(ARGS)

protos: $(VENV)/.stamp-test
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) .venv-audit build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
