# One command each: 'make demo' shows the main job, 'make test' runs the whole suite, 'make check' all that CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOKE := scripts/smoke.sh

.PHONY: demo test check setup lint wheel docs clean

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

# What is released answers in empty environments: the wheel, the source distribution, and the wheel as a tool of its own by pipx.
wheel: setup
	rm -rf dist build/wheel-venv build/pipx
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	$(SMOKE) build/wheel-venv/bin
	build/wheel-venv/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.tar.gz
	$(SMOKE) build/wheel-venv/bin
	build/wheel-venv/bin/python -m pip install --quiet pipx
	PIPX_HOME=build/pipx PIPX_BIN_DIR=build/pipx/bin build/wheel-venv/bin/pipx install --quiet --backend pip \
	  --pip-args="-c $(CURDIR)/constraints.txt" dist/*.whl
	$(SMOKE) build/pipx/bin

# The documentation as a site, in build/site.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf $(VENV) dist build
