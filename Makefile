# Every target makes what it needs, from nothing but make and Python >= 3.10.   make help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.diffpref-installed

# The small world's steps are short: waiting OpenMP threads that spin would slow them 2-10x on a busy machine, and more than a
# few threads do not make them faster.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 100
THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

# One process, on the GPU where there is one. Written out, because accelerate remarks on every value it has to assume.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

.DEFAULT_GOAL := help
.PHONY: help quickstart test style gallery bench clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /    make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

quickstart: $(STAMP)  ## teach the small world a taste and show what changed: a few minutes on two cores, no GPU needed
	@$(LAUNCH) diffpref/train.py --config configs/quickstart.yaml --overwrite true $(ARGS)

test: $(STAMP)  ## all tests (some of them: make test ARGS='-k objectives')
	@$(BIN)/pytest --numprocesses 2 --dist loadfile $(ARGS)

style: $(STAMP)  ## ruff and pyright
	@$(BIN)/ruff check
	@$(BIN)/pyright

gallery: $(STAMP)  ## rebuild gallery/
	@$(BIN)/python -m diffpref.emoji_world.gallery

bench: $(STAMP)  ## what the caches cost and save: about twenty minutes on two cores (see benchmarks/)
	@$(BIN)/python benchmarks/data.py $(ARGS)

clean:  ## remove what the targets made, except runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name a Python >= 3.10: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("diffpref needs Python >= 3.10, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into $(VENV), once (a few minutes, about 6 GB: torch brings its CUDA libraries) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -e '.[dev]'
	@touch $@
