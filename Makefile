# make demo   exports the shipped model with 32 of its 576 vision tokens and asks it one question
# make test   everything continuous integration runs
#
# PIP_FLAGS is handed to pip, for a machine with its own package index or wheel folder. On Linux the default package
# index brings torch with CUDA; a smaller CPU build is a matter of PIP_FLAGS too.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BUILD ?= build
KEEP ?= 32
# Processes that share the tests, a file each; `make test WORKERS=0` runs them in one.
WORKERS ?= auto

PYTEST = -m pytest -q -n $(WORKERS) --maxprocesses=4 --dist=loadfile
PIP = -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_FLAGS)
BIN = $(VENV)/bin
BUNDLE = $(BUILD)/mini-llava-k$(KEEP)
SOURCES = $(shell find runtime calib exporter -name '*.py' -o -path 'exporter/models/*' -type f)

# A Python 3.10 that runs (a version manager's stub may be on the path without one behind it).
PYTHON310 ?= $(shell for python in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do \
	"$$python" -c pass 2>/dev/null && { echo "$$python"; break; }; done)

.PHONY: demo test lint types test-runtime-310 pytest test-slow clean
.DEFAULT_GOAL := demo

# ---- environments ------------------------------------------------------------------------------------------------
$(VENV)/.export: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the exporter into $(VENV) (once; minutes)"
	$(BIN)/python $(PIP) torch
	$(BIN)/python $(PIP) -e '.[export]'
	touch $@

$(VENV)/.dev: $(VENV)/.export
	$(BIN)/python $(PIP) -e '.[export,rtx,profile,data,dev]'
	touch $@

# What a Jetson has: Python 3.10, no torch.
$(VENV)-310/.runtime: pyproject.toml constraints.txt
	test -x $(VENV)-310/bin/python || $(PYTHON310) -m venv $(VENV)-310
	$(VENV)-310/bin/python $(PIP) pytest pytest-xdist onnx
	$(VENV)-310/bin/python $(PIP) -e .
	touch $@

# ---- the demo ----------------------------------------------------------------------------------------------------
demo: $(VENV)/.export
	@mkdir -p $(BUILD)
	$(BIN)/svdprune export mini-llava --keep $(KEEP) --target cpu --out $(BUNDLE) --overwrite
	@question="$$($(BIN)/python tools/demo_picture.py $(BUILD)/demo.png)"; \
	echo "question       $$question"; \
	$(BIN)/svdprune run $(BUNDLE) --image $(BUILD)/demo.png --prompt "$$question" --picture $(BUILD)/kept.png

# ---- the tests: pytest's closing line is the last one ------------------------------------------------------------
test: lint types test-runtime-310 pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .

# Type checkers do not follow the mapping of folders to packages in an editable install: check what the wheel holds.
types: $(BUILD)/.types
$(BUILD)/.types: $(VENV)/.dev $(SOURCES) tools/check_wheel.py
	rm -rf $(BUILD)/wheel $(BUILD)/installed $(BUILD)/lib
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation -w $(BUILD)/wheel .
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(BUILD)/installed $(BUILD)/wheel/*.whl
	MYPYPATH=$(BUILD)/installed $(BIN)/mypy -p svdprune
	$(BIN)/python tools/check_wheel.py $(BUILD)/wheel/*.whl
	touch $@

test-runtime-310:
ifeq ($(PYTHON310),)
	@echo "no Python 3.10 here: the runtime's tests run under $(PYTHON) only"
else
	$(MAKE) --no-print-directory $(VENV)-310/.runtime
	$(VENV)-310/bin/python $(PYTEST) tests/runtime
endif

pytest: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST)

clean:
	rm -rf $(BUILD) $(VENV) $(VENV)-310 .mypy_cache .pytest_cache .ruff_cache *.egg-info
