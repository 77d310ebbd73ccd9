# Every target makes what it needs: a machine with make and Python 3.11 or later is enough.

PYTHON ?= python3
CORES ?= all
DEMO ?= demo
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test lint bench lock

help:
	@echo "make setup   make .venv with everything that requirements.lock names"
	@echo "make demo    make a small cohort in $(DEMO)/ and run the whole workflow on it"
	@echo "make test    run the tests"
	@echo "make lint    check code, types and workflow"
	@echo "make bench   run the benchmarks, one JSON line each"
	@echo "make lock    pin the dependencies of pyproject.toml anew"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Histrata needs Python 3.11 or later: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); torch is large, so the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup
	@test -f $(DEMO)/config.yaml || $(BIN)/histrata demo-data $(DEMO)
	$(BIN)/snakemake --cores $(CORES) --directory $(DEMO) --configfile $(DEMO)/config.yaml \
		--set-threads pyramid=1 embed=1 m2ost_predict=1  # small slides: side by side beats many threads
	@echo
	@echo "Done. Open $(DEMO)/results/report.html in a browser,"
	@echo "and read $(DEMO)/results/slides/demo-01/expression.h5ad with scanpy."

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint --configfile config/her2st/config.yaml

bench: setup
	@for name in check pyramid windows memory m2ost_train m2ost_predict; do $(BIN)/python benchmarks/$$name.py || exit 1; done

lock: setup
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --generate-hashes --upgrade \
		--no-emit-index-url --no-emit-find-links --python-version 3.11 --group dev pyproject.toml -o requirements.lock
