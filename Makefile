# The same verbs for a person and for CI. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := benchmarks/.venv
# -I: what PYTHONPATH has besides would count as installed.
PEERS_INSTALL := $(PEERS)/bin/python -I -m pip install --quiet --disable-pip-version-check --constraint benchmarks/constraints.txt
# Tests measure results, not speed: one thread a process keeps two cores honest.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONWARNINGS=default

.DEFAULT_GOAL := help
.PHONY: help install train article test test-long mutation coverage-table lint bench docs clean

help:  ## Show the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED)  ## Make .venv with Shoal and what development needs

$(INSTALLED): pyproject.toml setup.py constraints.txt src/shoal/comm/shared_memory/core.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

train: $(INSTALLED)  ## Train a ResNet on real images, on two ranks
	$(BIN)/shoal train recipes/digits.yaml --strategy dp2

article: $(INSTALLED)  ## The procedure of the article that Shoal began with (about 10 minutes)
	$(BIN)/python examples/article.py

test: $(INSTALLED)  ## Run the tests (under 10 minutes on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not long" -n 2 --dist loadgroup

test-long: $(INSTALLED)  ## Run the tests that take minutes each
	$(TEST_ENV) $(BIN)/python -m pytest -m long --timeout 1800

coverage-table: $(INSTALLED)  ## Verify the zoo's models under the strategies; writes docs/coverage.md (an hour)
	$(TEST_ENV) $(BIN)/python tests/coverage

mutation: $(INSTALLED)  ## Plant bugs; how many does verify find, and name?
	$(TEST_ENV) $(BIN)/python tests/mutation

lint: $(INSTALLED)  ## Style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) $(PEERS)/.installed $(PEERS)-local/.installed  ## Measure, side by side; results go to benchmarks/results
	$(BIN)/python benchmarks/run.py

# What Shoal is measured against, apart from it. DeepSpeed's build asks the torch that is there, so
# torch comes first, and nothing of it is compiled before it is used.
$(PEERS)/.installed: benchmarks/constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_INSTALL) torch numpy setuptools wheel packaging ninja
	$(PEERS_INSTALL) accelerate lightning-fabric "ray[train]" pydantic pyyaml xxhash
	DS_BUILD_OPS=0 $(PEERS_INSTALL) --no-build-isolation deepspeed
	touch $@

# What local steps are measured against: their needs (protobuf, grpcio) do not agree with the others'.
$(PEERS)-local/.installed: benchmarks/local-constraints.txt
	$(PYTHON) -m venv $(PEERS)-local
	$(PEERS)-local/bin/python -I -m pip install --quiet --disable-pip-version-check --constraint benchmarks/local-constraints.txt torch numpy pydantic pyyaml xxhash hivemind torchft
	touch $@

docs: $(INSTALLED)  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean:  ## Remove what was built (runs are kept)
	rm -rf $(VENV) $(PEERS) $(PEERS)-local benchmarks/.data site build dist
