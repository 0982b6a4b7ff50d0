# The two main commands, `make demo` and `make test`, need nothing but Python: they set up .venv here and share it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SCENE := src/opensan/assets/scenes/playground.png

WORDS ?= night sky,brick,green heart,white heart,orange circle,orange cross,red square
export WORDS

.PHONY: help demo test lint docs bench

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Segment a bundled scene with your words: make demo WORDS="brick,green heart"
	@mkdir -p out/demo
	@$(BIN)/opensan segment $(SCENE) --model tiny --words "$$WORDS" --out out/demo

test: lint ## Run every check and test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(READY) ## Check style, types, and that every module imports only from those below it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(READY) ## Build the documentation's site, into out/site
	$(BIN)/zensical build --strict

# Interleaved with the plain computation, in one process each: on a quiet machine, about half an hour.
bench: $(READY) ## Time everything against the plain computation, into out/bench
	@mkdir -p out/bench
	@for model in san-vit-b16 san-vit-l14; do \
		$(BIN)/python bench/segment.py words --model $$model --out out/bench/words-$$model; done
	@for what in sizes parts memory; do $(BIN)/python bench/segment.py $$what --out out/bench/$$what; done
	@for what in label_map text training_step startup; do \
		$(BIN)/python bench/$$what.py --json out/bench/$$what.json | tee out/bench/$$what.md; done

# Made anew when the dependencies change. A setup cut short leaves no $(READY), so the next command goes on with it.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "opensan needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV): the first time PyTorch is downloaded, which takes some minutes."
	@[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[dev]" \
		| awk '/^(Collecting|Installing|Successfully)/ { print "  " substr($$0, 1, 100); fflush() }'
	@touch $@
