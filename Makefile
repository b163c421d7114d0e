# Two commands do everything, set-up included:  make quickstart   and   make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test lint docs wheel-check gpu clean

quickstart: $(VENV)/.eval
	$(BIN)/ssa quickstart --out runs/quickstart

test: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

# On a machine with a GPU: the proofs of the kernels
gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu -n 8

# Source distribution and wheel, installed with their dependencies into an empty environment
wheel-check: $(VENV)/.dev
	rm -rf build/check && $(BIN)/python -m build --outdir build/check .
	$(PYTHON) -m venv build/check/venv
	build/check/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/check/*.whl
	cd build/check && venv/bin/ssa --version && venv/bin/python -c "import ssa.ops" && venv/bin/ssa doctor

$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist site
