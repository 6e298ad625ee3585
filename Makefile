# expertmesh: `make serve` is all that a first look needs; `make help` lists the rest.

ifeq ($(filter else-if,$(.FEATURES)),)
$(error GNU make 3.81 or newer is needed)
endif

VENV := .venv
BIN := $(VENV)/bin
# Clients of other projects, Redis and Prometheus, for parts 6 and 7 of `make test-long`, with their
# own versions.
CLIENTS := .venv-clients
# Where the CPU build of torch comes from on a machine without an NVIDIA GPU, when it answers.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Arguments for `make serve`, `make bench` and the GPU checks, for example ARGS="--port 8080".
ARGS ?=
PYTEST_ARGS ?=
# The Python of `make gpu-check`; empty: one that is found.
PYTHON_GPU ?=
# Which part of `make test-long` to run: 1 to 9, instructions, starved, or all of them.
PART ?= all
# Mutants of pure modules in part 8, of which 95% must fail the unit tests, and what draws them.
MUTANTS ?= 80
SEED ?= 1

INPUTS := pyproject.toml $(wildcard requirements/*.txt) .ci/setup.py
CLIENT_INPUTS := $(addprefix tests/conformance/clients/,requirements.txt constraints.txt package.json) \
	docs/node-client/package.json .ci/clients.py
INSTALL = python=$$(sh .ci/find-python.sh) && \
	"$$python" .ci/setup.py --venv $(VENV) --torch-cpu-index "$(TORCH_CPU_INDEX)"

# Each module is compiled once, not by each of the many processes that tests and servers start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-test setup-clients serve check test test-long lint types units audit bench gpu-check gpu-cluster-check docs release lock protos clean
.DEFAULT_GOAL := help

help:
	@echo "make setup    .venv with what serving needs"
	@echo "make serve    start a cluster and serve the bundled model (ARGS=\"--port 8080\")"
	@echo "make check    ruff, import contracts, mypy, quick tests without processes (minutes)"
	@echo "make test     make check, and tests with processes (PYTEST_ARGS=\"-k name\")"
	@echo "make test-long  everything but GPU tests, for hours, or a part of it (PART=1)"
	@echo "make setup-clients  .venv-clients with clients of other projects, Redis and Prometheus, for parts 6 and 7"
	@echo "make audit    look for known holes in the pinned packages"
	@echo "make bench    measure, and write docs/results"
	@echo "make gpu-check  check and measure the GPU path on one GPU (ARGS=\"--budget 570\"), offline"
	@echo "make gpu-cluster-check  check and measure clusters on all GPUs of this host"
	@echo "make docs     build the documents as a site in build/docs; a warning is an error"
	@echo "make release  build and test wheel and image of the version"
	@echo "make lock     write requirements/ anew from pyproject.toml and constraints.txt"
	@echo "make protos   generate the stubs in protos/"
	@echo "make clean    remove .venv and caches"

$(VENV)/.stamp-run: $(INPUTS)
	@$(INSTALL) run

$(VENV)/.stamp-test: $(INPUTS)
	@$(INSTALL) test

$(CLIENTS)/.stamp-clients: $(CLIENT_INPUTS)
	@python=$$(sh .ci/find-python.sh) && \
		"$$python" .ci/clients.py --venv $(CLIENTS) --torch-cpu-index "$(TORCH_CPU_INDEX)"

setup: $(VENV)/.stamp-run

setup-test: $(VENV)/.stamp-test

setup-clients: $(CLIENTS)/.stamp-clients

serve: $(VENV)/.stamp-run
	@EXPERTMESH_PARENT=$$PPID exec $(BIN)/expertmesh serve $(ARGS)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.stamp-test
	$(BIN)/mypy

UNITS := not distributed and not ray and not gpu and not slow
MARKS := $(UNITS) and not heavy
PYTEST := PYTHONFAULTHANDLER=1 $(BIN)/python -m pytest
# Processes with a compute thread each: one more than processors, as tests also wait, at most 8.
# One that has no tests left takes some of another.
PYTEST_MANY := $(PYTEST) -n $(shell n=$$(nproc); echo $$((n < 8 ? n + 1 : 8))) --dist worksteal
# Tests that PYTEST_ARGS selects may all be on one side of a division.
NONE_IS_FINE = $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

units: $(VENV)/.stamp-test
	$(PYTEST_MANY) -m "$(MARKS)" $(PYTEST_ARGS) $(NONE_IS_FINE)

check: $(VENV)/.stamp-test
	@$(MAKE) --no-print-directory -j 3 lint types units

test: $(VENV)/.stamp-test
	@$(MAKE) --no-print-directory -j 3 lint types units MARKS="not ray and not gpu and not slow"
	$(PYTEST) -m "ray and not gpu and not slow" $(PYTEST_ARGS) $(NONE_IS_FINE)

# The long tier: all tests but those for a GPU, and a skip fails. Each part takes about 30 minutes
# on two cores, part 4 about 60: units; layouts; other clusters of threads; clusters of processes;
# served clusters and the command line; real clients; pretended hosts, pods and tutorials; mutants, and faults of each family;
# a real trained model.
LONG := $(PYTEST) --no-skips --hypothesis-profile=long
TWO := -n 2 --dist worksteal
LAYOUTS := $(addprefix tests/system/,test_deterministic.py test_family_pairs.py test_layouts.py)
CLIENT_TESTS := tests/conformance
HOSTS := tests/pretend_hosts tests/k8s/test_pretend_pods.py tests/project/test_tutorial.py
FAMILY_FAULTS := tests/system/faults/test_faults_of_families.py
REAL_MODEL := tests/real_model
STARVED := tests/system/faults/test_starved_machine.py
NOT_FOREIGN := $(addprefix --ignore=,$(CLIENT_TESTS) $(HOSTS) $(REAL_MODEL))
PART_1 := $(TWO) -m "not gpu and not ray and not distributed" $(NOT_FOREIGN)
PART_2 := $(TWO) -m "not gpu and not ray" $(LAYOUTS)
PART_3 := $(TWO) -m "distributed and not gpu and not ray" $(addprefix --ignore=,$(LAYOUTS)) \
	$(NOT_FOREIGN)
PART_4 := -m "ray and not gpu" tests/system $(addprefix --ignore=,$(FAMILY_FAULTS) $(STARVED))
PART_5 := -m "ray and not gpu" --ignore=tests/system $(NOT_FOREIGN)
PART_6 := -m "not gpu" $(CLIENT_TESTS)
PART_7 := -m "not gpu" $(HOSTS)
PART_9 := -m "not gpu" $(REAL_MODEL)
# Thirty busy processes beside a cluster: nothing else may run on the machine meanwhile.
PART_starved := -m "ray" $(STARVED)

# What computes with kernels, on processors with fewer instructions than this one: ours, and torch's.
NATIVE_TESTS := tests/workers --ignore=tests/workers/cuda
LESS := from tests.workers.native.builds import NAMES; print(*NAMES[1:])

test-long: $(addprefix test-long-,$(if $(filter all,$(PART)),1 2 3 4 5 6 7 8 9 instructions starved,$(PART)))

test-long-instructions: $(VENV)/.stamp-test
	for best in $$($(BIN)/python -c "$(LESS)"); do \
		EXPERTMESH_MAX_INSTRUCTIONS=$$best ATEN_CPU_CAPABILITY=avx2 \
			$(LONG) $(TWO) -m "$(UNITS)" $(NATIVE_TESTS) $(PYTEST_ARGS) || exit 1; \
	done

test-long-8: $(VENV)/.stamp-test
	$(BIN)/python -m tests.mutation --num $(MUTANTS) --seed $(SEED)
	$(LONG) -m "ray and not gpu" $(FAMILY_FAULTS) $(PYTEST_ARGS)

# Redis, in which pretended heads keep Ray's state, comes with the clients.
test-long-6 test-long-7: $(CLIENTS)/.stamp-clients

test-long-%: $(VENV)/.stamp-test
	$(LONG) $(PART_$*) $(PYTEST_ARGS)

audit:
	@python=$$(sh .ci/find-python.sh) && "$$python" .ci/audit.py

bench: $(VENV)/.stamp-test
	$(BIN)/python -m benchmarks.run $(ARGS)

# Installs nothing, and needs neither Ray nor a network: it runs with a Python that already has torch
# (of CUDA), safetensors, numpy, msgspec and llguidance. That is PYTHON_GPU, or else the first of
# .venv and python3 whose torch sees a GPU.
gpu-check:
	@python=$$(sh benchmarks/gpu_check/find-python.sh $(PYTHON_GPU)) && \
		exec "$$python" -m benchmarks.gpu_check $(ARGS)

gpu-cluster-check: $(VENV)/.stamp-run
	$(BIN)/python -m benchmarks.gpu_cluster_check $(ARGS)

docs: $(VENV)/.stamp-test
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

release: $(VENV)/.stamp-test
	$(BIN)/python .ci/release.py $(ARGS)

lock: $(VENV)/.stamp-test
	$(BIN)/python .ci/lock.py

protos: $(VENV)/.stamp-test
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) $(CLIENTS) .venv-audit build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache
