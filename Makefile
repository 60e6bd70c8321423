PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools
# Extra arguments for the main job, for example: make compare ARGS="--preset smoke"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install compare test lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Compiling every module of torch and transformers takes longer than fetching them, so only what we import is compiled.
USED := datasets, scipy.stats, matplotlib.pyplot, pyarrow.parquet, crosscoder.cli, crosscoder.studies.shapes, \
  crosscoder.report.page
USED_TOO := torch._dynamo, transformers.models.llama.modeling_llama

# What the main job needs, and with the tools what tests and lint need too. Installed again only when the list of
# requirements changes; the package itself is an editable install.
$(STAMP): EXTRAS := demo,gguf
$(TOOLS): EXTRAS := demo,gguf,test
$(TOOLS): USED := $(USED), pytest, hypothesis
$(STAMP) $(TOOLS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; found $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	@unset PYTHONDONTWRITEBYTECODE; $(BIN)/python -c 'import $(USED_TOO)' & \
	  $(BIN)/python -c 'import $(USED)' && wait $$!
	@touch $(STAMP) $@

install: $(TOOLS)  ## create .venv and install everything

compare: $(STAMP)  ## the main job: train, count, compare, and print the path of the report
	@$(BIN)/crosscoder compare $(ARGS)

test: $(TOOLS)  ## the whole test suite
	@$(BIN)/python -m pytest $(ARGS)

lint: $(TOOLS)  ## ruff check, ruff format --check, type check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/ty check

format: $(TOOLS)  ## rewrite the files in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
