# Every target sets up .venv first; that is instant when nothing changed.
SHELL := bash
.DEFAULT_GOAL := help
export PYTHON
BIN := .venv/bin

.PHONY: help setup quickstart test check format build lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## create or complete .venv (Python 3.12, locked versions)
	@bash .ci/setup

quickstart: setup ## the whole method in miniature: demos to success rates and a report
	$(BIN)/lapa run experiment=quickstart

test: setup ## run the tests, two files at a time; ARGS="tests/envs -k reach" to select
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: setup ## lint, format, import contract, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup ## mend formatting and what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: setup ## build source archive and wheel, then try the wheel from an empty folder
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	bash .ci/smoke_wheel

lock: setup ## write requirements.lock anew from pyproject.toml
	$(BIN)/python -m uv pip compile --universal --python-version 3.12 --upgrade --extra dev --no-annotate \
		--no-emit-index-url --custom-compile-command "make lock" -c .ci/constraints.txt -o requirements.lock pyproject.toml

clean: ## remove build products and tool caches; .venv and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
