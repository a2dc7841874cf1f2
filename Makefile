# One command each: 'make demo' shows the main job, 'make test' tests within minutes, 'make test-all' runs every test,
# 'make check' does all that CI does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOKE := scripts/smoke.sh
PIPX := PIPX_HOME=build/pipx PIPX_BIN_DIR=build/pipx/bin build/pipx-venv/bin/pipx
RELEASE := build/pipx/venvs/laserlm

WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: demo test test-all test-slow test-gpu check setup lint wheel docs clean

demo: setup
	$(BIN)/laser demo

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

# What 'make test' leaves of 'make test-all'.
test-slow: setup
	$(PYTEST) -m slow

# What needs a CUDA GPU; without one, a line says so.
test-gpu: $(VENV)/installed
	scripts/gpu_check.sh

check: test test-slow lint wheel

setup: $(VENV)/installed
	$(BIN)/laser setup

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "laserlm needs Python 3.11 or newer; say which with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[test]'
# pip compiles on one core. Some packages ship files for other versions of Python, which do not compile.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is released answers in an empty environment, made by pipx. The wheel does; the source distribution installs the same files.
wheel: setup
	rm -rf dist build/pipx-venv build/pipx build/sdist
	$(BIN)/python -m build --quiet --no-isolation
	cd dist && sha256sum *.whl *.tar.gz > SHA256SUMS && sha256sum --check --quiet SHA256SUMS
	$(PYTHON) -m venv build/pipx-venv
	build/pipx-venv/bin/python -m pip install --quiet pipx
	$(PIPX) install --quiet --backend pip --pip-args="--no-compile -c $(CURDIR)/constraints.txt" dist/*.whl
	$(SMOKE) build/pipx/bin
	$(RELEASE)/bin/python -m pip install --quiet --no-deps --target build/sdist dist/*.tar.gz
	diff -r -x __pycache__ build/sdist/laserlm $(RELEASE)/lib/python*/site-packages/laserlm
	diff -r -x RECORD -x REQUESTED -x direct_url.json build/sdist/laserlm-*.dist-info $(RELEASE)/lib/python*/site-packages/laserlm-*.dist-info

# The documentation as a site, in build/site.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf $(VENV) dist build
