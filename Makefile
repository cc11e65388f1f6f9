# Everything a developer does. `make` alone prints this help. Only Python >= 3.11, make and a C compiler are needed; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := crds/atelier_api operator/atelier_operator runtime/atelier_runtime cli/atelier_cli
CODE := $(PACKAGES) helm tests examples docs/modelgen.py
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast conformance verify format crds bench bench-gpu cluster cluster-down e2e-image clean

help:  ## print this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make the virtual environment .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@echo "==> making $(VENV) (about 5 GB; one to three minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python %d.%d is too old: Atelier needs 3.11 or newer (set PYTHON=...)" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "uv>=0.9"
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[cli,runtime,deepspeed,operator,demo,dev]'
	@touch $@

demo: setup  ## train a LoRA on real pictures with two processes and open the result's report (under 5 minutes)
	$(BIN)/python examples/demo/demo.py

test: setup  ## the whole test suite; the first time it builds a Kubernetes (ten minutes)
	-$(BIN)/python tests/support/cluster/main.py build
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 40 --times

test-fast: setup  ## the tests that start no process groups and no servers, without the sweeps (under 3 minutes)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes and not sweep"

conformance: setup  ## try every cell of every model family and write down and print what is proved (eight to ten minutes)
	$(BIN)/pytest -n 2 --dist loadfile -m cell --record-conformance
	$(BIN)/python docs/modelgen.py
	@$(BIN)/atelier models --proved

verify: setup  ## formatting, lint, types, import directions, generated files
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m atelier_api.crdgen --check
	$(BIN)/python -m atelier_api.docgen --check
	$(BIN)/python helm/chartgen.py --check
	$(BIN)/python docs/modelgen.py --check

format: setup  ## format the code and mend what the linter can
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

crds: setup  ## regenerate the CRDs, the chart's schema and the reference pages from the types
	$(BIN)/python -m atelier_api.crdgen
	$(BIN)/python -m atelier_api.docgen
	$(BIN)/python helm/chartgen.py
	$(BIN)/python docs/modelgen.py

bench: setup  ## speed, as ratios of interleaved runs and as counts (performance.md names the targets)
	$(BIN)/python tests/bench/main.py

bench-gpu: setup  ## training steps on this machine's GPU against diffusers' example trainers, and predicted against real memory
	$(BIN)/python tests/bench/gpu/main.py

cluster: setup  ## a real Kubernetes cluster on this machine (the first one builds it: ten minutes and more)
	$(BIN)/python tests/support/cluster/main.py up

cluster-down: setup  ## take that cluster away with everything that it made
	$(BIN)/python tests/support/cluster/main.py down

e2e-image: setup  ## build the runtime's image and train with it on two nodes (not part of `make test`: eight minutes, 45 GB free; needs root)
	$(BIN)/pytest tests/e2e/operator/runtime_image.py

clean:  ## remove what the targets above have made, but not the runs
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
