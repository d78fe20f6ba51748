# One virtual environment, made once, remade when the project's dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= test,lint

# A Linux machine without an NVIDIA driver should not download gigabytes of CUDA: take torch from its CPU index where that
# can be reached. `make TORCH_INDEX=` turns this off, `make TORCH_INDEX=URL` names another index.
TORCH_CPU := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell sh tools/torch-index.sh $(TORCH_CPU))

# Tests run on every core, each worker with so many threads of its own.
WORKERS ?= auto
THREADS ?= 1
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=$(THREADS) MITHRIDATE_TEST_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: install demo reproduce test test-slow lint types docs dist format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mithridate needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: install
	$(BIN)/mithridate demo

# Every published table and figure at the scale that only shows that it runs.
reproduce: install
	$(BIN)/mithridate reproduce all --scale smoke --out build/reproduced --jobs $(JOBS) --threads 1

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# What a user gets: wheel and source archive, the wheel made from the archive, installed where nothing else is, and used.
# The audit is of a model that is known to fail it (exit code 1).
EMPTY := build/empty
dist: install
	rm -rf dist $(EMPTY)
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv $(EMPTY)
	$(EMPTY)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(EMPTY)/bin/python -m pip install --quiet dist/*.whl
	$(EMPTY)/bin/python -c 'import mithridate, pathlib; assert (pathlib.Path(mithridate.__file__).parent / "py.typed").is_file()'
	$(EMPTY)/bin/mithridate list defences >/dev/null
	test "$$($(EMPTY)/bin/mithridate reproduce --list | grep -c -E '^(pang2021|zhu2023)-')" = 38
	$(EMPTY)/bin/mithridate demo --out $(EMPTY)/demo && test -s $(EMPTY)/demo/report.html
	$(EMPTY)/bin/mithridate audit examples/audit/digits.toml --out $(EMPTY)/audit; test $$? = 1

# The docs site, its notebooks executed; a warning is an error. The libraries of the guard's adapters come with it, for a
# notebook and some pages use them.
DOCS := $(VENV)/.installed-docs

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS),docs,loops]'
	touch $@

docs: $(DOCS)
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo-report
