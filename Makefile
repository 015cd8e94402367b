# `make` or `make help` lists the targets. Everything a target needs is set up on the way.
#
# Variables:
#   PYTHON       the interpreter that the virtual environment is made from (3.11)
#   TORCH_INDEX  package index that torch's CPU build comes from where pip's own settings have none;
#                PyTorch's own unless set
#   CONFIG, PORT what `make serve` runs, and its HTTP port if not the configuration's
#   PYTEST_ARGS  more arguments for pytest
#   RDMA_DEVICE  an RDMA device of this machine for test-rdma and bench-rdma; without one they make
#                a virtual machine
#   FUZZ_ARGS    options of libFuzzer for `make fuzz`; by default it ends after an hour
#   SOAK_MINUTES, NUISANCE_MINUTES
#                how long `make soak` and `make nuisances` last; 30 and 10
#   BENCH_ARGS   arguments for the bench targets: --rounds of each; for bench-transfer --quick, the
#                bars' cases only, 2 minutes, and --before REV, that build of ours beside the
#                present one; --help lists them

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
CONFIG ?= config.yaml
PORT ?=
PYTEST_ARGS ?=
RDMA_DEVICE ?= $(firstword $(notdir $(wildcard /sys/class/infiniband/*)))
BENCH_ARGS ?=
FUZZ_ARGS ?= -max_total_time=3600
SOAK_MINUTES ?= 30
NUISANCE_MINUTES ?= 10

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.baton-setup
# Empty for root and where sudo is missing: apt then says itself what it lacks.
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
CODE := serve_app deployments transfer tests requirements bench

.PHONY: help setup serve unit test chaos soak nuisances fuzz test-rdma rdma-ready bench-transfer \
  bench-rdma bench-interference check format model lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP) ## Make the virtual environment and install the pinned dependencies

# Debian splits ensurepip off into python3-venv; only then is apt asked.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y python3-venv; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): requirements/cpu.lock requirements/install.py pyproject.toml | $(BIN)/python
	$(BIN)/python requirements/install.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

model: $(STAMP) ## Fetch and convert the demo model (once)
	@$(BIN)/baton model

serve: model ## Set everything up, start etcd, Ray and the demo, and serve until Ctrl-C
	@exec $(BIN)/baton up $(CONFIG) $(if $(PORT),--port $(PORT))

unit: $(STAMP) ## Run the unit tests: no process, no socket, no model
	@$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

test: model ## Run every test but those marked slow
	@$(BIN)/python -m pytest tests $(PYTEST_ARGS)

chaos: $(STAMP) ## Inject every fault under load and write the table in docs/reliability.md (half an hour)
	rm -rf build/chaos
	@status=0; $(BIN)/python -m pytest tests/chaos -m 'chaos and not soak' $(PYTEST_ARGS) || status=$$?; \
	  CHAOS_TLS=1 $(BIN)/python -m pytest tests/chaos -m 'chaos and not soak' -k strangers || status=$$?; \
	  $(BIN)/python -m tests.support.chaos.table; exit $$status

soak: $(STAMP) ## Mixed traffic and a random fault every 20 s (SOAK_MINUTES)
	SOAK_MINUTES=$(SOAK_MINUTES) $(BIN)/python -m pytest tests/chaos/test_soak.py -m soak -s $(PYTEST_ARGS)

nuisances: $(STAMP) ## Right, wrong and broken requests mixed, 20 a second (NUISANCE_MINUTES)
	NUISANCE_MINUTES=$(NUISANCE_MINUTES) $(BIN)/python -m pytest \
	  tests/chaos/test_nuisances.py -m soak -s $(PYTEST_ARGS)

FUZZ := .fuzz

fuzz: $(STAMP) $(FUZZ)/atheris.ok ## Look for bytes that break a decoder of the wire (FUZZ_ARGS)
	@mkdir -p $(FUZZ)/corpus
	PYTHONPATH=$(CURDIR):$(FUZZ)/atheris $(BIN)/python -m tests.fuzz.wire $(FUZZ)/corpus $(FUZZ_ARGS)

$(FUZZ)/atheris.ok: Makefile | $(STAMP)
	$(BIN)/python -m pip install --quiet --target $(FUZZ)/atheris atheris==3.0.0
	@touch $@

RDMA_PACKAGES := qemu-system-x86 busybox-static kmod iproute2 ibverbs-providers ibverbs-utils \
  python3-pyverbs perftest

# The beginning of a command that needs a device; the argument is RDMA_VM_LINK, should it be virtual.
on_rdma = $(if $(RDMA_DEVICE),RDMA_DEVICE=$(RDMA_DEVICE),RDMA_VM_LINK=$(1) tests/rdma/run-in-vm.sh)

rdma-ready: $(STAMP)
	@dpkg -s $(RDMA_PACKAGES) >/dev/null 2>&1 || { $(SUDO) apt-get update -q && \
	  $(SUDO) apt-get install -q -y --no-install-recommends $(RDMA_PACKAGES); }
	@$(BIN)/python -m compileall -q transfer tests bench  # there it would take long

test-rdma: rdma-ready ## Test RDMA on this machine's device, or in a virtual machine with soft-RoCE
	@$(call on_rdma,two) \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/rdma tests/conformance/transfer -k rdma \
	  $(PYTEST_ARGS)

# What is written in the virtual machine is gone with it: the report is written out here.
bench-rdma: rdma-ready ## Measure RDMA beside perftest, on a device as test-rdma (3 minutes; see BENCH_ARGS)
	@$(call on_rdma,one) $(BIN)/python -m bench.rdma.measure $(BENCH_ARGS) \
	  | $(BIN)/python -m bench.rdma.report --out docs/benchmarks/rdma.md

bench-interference: $(STAMP) ## Measure what reading costs a model in the same process (1 minute; see BENCH_ARGS)
	PYTHONPATH=$(CURDIR) $(BIN)/python -m bench.interference --out docs/benchmarks/interference.md \
	  $(BENCH_ARGS)

# Peers of the transfer benchmark, each in an environment of its own.
BENCH := .bench
MOONCAKE := mooncake-transfer-engine-non-cuda==0.3.13.post1
NIXL := nixl==1.3.2 nixl-cu12==1.3.2
PLOT := matplotlib==3.11.2

bench-transfer: $(STAMP) $(BENCH)/mooncake.ok $(BENCH)/nixl.ok $(BENCH)/plot.ok ## Measure the transfer engine beside its peers (7 minutes; see BENCH_ARGS)
	@command -v iperf3 >/dev/null \
	  || { $(SUDO) apt-get update -q && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	       apt-get install -q -y iperf3; }
	PYTHONPATH=$(CURDIR) $(BIN)/python -m bench.transfer --environments $(BENCH) \
	  --out docs/benchmarks/transfer.md $(BENCH_ARGS)

$(BENCH)/mooncake.ok: Makefile | $(BIN)/python
	$(BIN)/python -m venv $(BENCH)/mooncake
	$(BENCH)/mooncake/bin/python -m pip install --quiet numpy $(MOONCAKE)
	@touch $@

# NIXL imports torch but does nothing with it here: it gets ours rather than gigabytes of CUDA.
$(BENCH)/nixl.ok: Makefile | $(STAMP)
	$(BIN)/python -m venv $(BENCH)/nixl
	$(BENCH)/nixl/bin/python -m pip install --quiet --no-deps $(NIXL)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(BENCH)/nixl/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
	@touch $@

$(BENCH)/plot.ok: Makefile | $(BIN)/python
	$(BIN)/python -m venv $(BENCH)/plot
	$(BENCH)/plot/bin/python -m pip install --quiet $(PLOT)
	@touch $@

check: $(STAMP) ## Lint, formatting, types, spelling, import direction
	@failed=0; run() { echo "+ $$*"; "$$@" || failed=1; }; \
	run $(BIN)/ruff check $(CODE); \
	run $(BIN)/ruff format --check $(CODE); \
	run $(BIN)/mypy; \
	git ls-files -z > $(VENV)/tracked; \
	run xargs -0 -a $(VENV)/tracked $(BIN)/codespell; \
	run $(BIN)/lint-imports; \
	exit $$failed

format: $(STAMP) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

lock: $(STAMP) ## Resolve the dependencies anew and rewrite requirements/cpu.lock
	$(BIN)/python requirements/lock.py

clean: ## Remove the virtual environment and caches (the demo model stays)
	rm -rf $(VENV) $(BENCH) $(FUZZ) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
