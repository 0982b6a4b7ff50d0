# The two main commands, `make demo` and `make test`, need nothing but Python: they set up .venv here and share it.
# `make demo` installs only what opensan itself needs; `make test` and the others add what the tests need.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_FOR_DEMO := $(VENV)/.ready-for-demo

WORDS ?= sky, road, tree, bicycle
export WORDS

.PHONY: help demo test lint docs bench release

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY_FOR_DEMO) ## Label a bundled photograph with your words: make demo WORDS="sky, road"
	@$(BIN)/opensan demo --words "$$WORDS"

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

MOST_BYTES_OF_WHEEL := 60000000

# What remains to be done is to upload: twine upload out/release/*
release: $(READY_FOR_DEMO) ## Build and check the files of a release, into out/release
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[release]"
	@rm -rf out/release
	@$(BIN)/python -m build --outdir out/release > /dev/null
	@$(BIN)/python -m twine check --strict out/release/*
	@for wheel in out/release/*.whl; do \
		bytes=$$(wc -c < $$wheel); echo "$$wheel: $$bytes bytes"; \
		(( bytes < $(MOST_BYTES_OF_WHEEL) )) || { echo "a wheel may have $(MOST_BYTES_OF_WHEEL) bytes" >&2; exit 1; }; done

# $(1): the extras to install, in brackets, or nothing.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "opensan needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV): the first time PyTorch is downloaded, which takes some minutes."
	@[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".$(1)" \
		| awk '/^(Collecting|Installing|Successfully)/ { print "  " substr($$0, 1, 100); fflush() }'
endef

# Made anew when the dependencies change. A setup cut short leaves no mark, so the next command goes on with it.
$(READY_FOR_DEMO): pyproject.toml
	$(call install)
	@touch $@

$(READY): pyproject.toml
	$(call install,[dev])
	@touch $(READY_FOR_DEMO) $@
