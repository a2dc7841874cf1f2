# One command each: 'make demo' shows the main job, 'make test' runs the whole suite, 'make check' all that CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check setup lint wheel clean

demo: setup
	$(BIN)/laser demo

test: setup
	$(BIN)/python -m pytest

check: test lint wheel

setup: $(VENV)/installed
	$(BIN)/laser setup

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "laserlm needs Python 3.11 or newer; say which with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel, alone in an empty environment, answers.
wheel: $(VENV)/installed
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd build && wheel-venv/bin/laser --help && wheel-venv/bin/laser --version && \
	  wheel-venv/bin/python -c 'import laserlm; print(len(laserlm.task("worldfacts").every), "questions in the wheel")'

clean:
	rm -rf $(VENV) dist build
