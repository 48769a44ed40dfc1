# make demo   set up, then train, evaluate, consolidate and look at a tiny segmentor on this machine (no GPU needed)
# make test   set up, then the test suite
# make test-slow   set up, then further settings of what it proves, in some minutes
# make test-multinode   set up, then runs over ssh between hosts in network namespaces, under Slurm and OpenMPI; needs root, and says which packages it lacks
# make check   style, format and types
# make docs   set up, then the site in docs/_build/html, from the pages and the docstrings; a warning is an error (DOCS_VERSION=dev: what its pages say they are of)
# make soak   set up, then a long training under random faults, in some hours; needs root (docs/when_something_fails.md)

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet -c constraints.txt
TORCH  := $(shell sed -n 's/^torch===//p' constraints.txt)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-multinode check docs soak setup clean
demo: setup
	$(BIN)/python launch/demo.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-multinode: setup
	$(BIN)/python -m pytest -m multinode

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(PIP) --config-settings editable_mode=compat -e '.[docs]'
	INTERNSEG_DEVICE=cpu $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

soak: setup
	$(BIN)/python benchmarks/soak.py --out $(or $(OUT),work_dirs/soak)

setup: $(VENV)/.installed

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) ..."
	$(PIP) torch torchvision setuptools wheel packaging ninja opencv-python-headless
	@touch $@

# compiled once per machine, in 100 seconds of CPU, and kept in ~/.cache
$(VENV)/.mmcv: $(VENV)/.torch
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m internseg_ds.cli.build_mmcv
	@touch $@

$(VENV)/.installed: $(VENV)/.mmcv pyproject.toml
	@echo "installing the rest ..."
	$(PIP) --config-settings editable_mode=compat -e '.[test,check]'
	@touch $@

clean:
	rm -rf $(VENV) work_dirs
