# Two commands: `make run` sets up and runs the main job, `make test` sets up and runs lint and the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
STAMP := $(VENV)/installed
# Plain PyTorch is tested on all cores at once; Ray, which takes the cores itself, after it.
PLAIN := --numprocesses auto --dist loadfile tests/blocks tests/training
WITH_RAY := --durations 20 tests/cluster tests/pipelines tests/test_*.py

.PHONY: run test test-all lint format constraints bench-env

run: $(STAMP)
	$(BIN)/fastray train digits

test: lint
	$(BIN)/python -m pytest -m "not slow" $(PLAIN)
	$(BIN)/python -m pytest -m "not slow" $(WITH_RAY)

test-all: lint
	$(BIN)/python -m pytest $(PLAIN)
	$(BIN)/python -m pytest $(WITH_RAY)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installs once; again only when pyproject.toml or the pinned versions change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,examples,text]"
	touch $(STAMP)

# Renews the pins: the newest versions that pyproject.toml allows, from an environment made for it.
constraints:
	rm -rf $(VENV)-constraints
	$(PYTHON) -m venv $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install ".[dev,examples,text,vision,bench]"
	( echo "# Made by 'make constraints': the versions the tests run with."; \
	  $(VENV)-constraints/bin/python -m pip freeze --exclude fastray ) > constraints.txt
	rm -rf $(VENV)-constraints

# The environment of the benchmarks' peers. It sees the project's packages (one torch for both) and has its own fastai, whose
# older plum would break ours.
bench-env: $(STAMP)
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --no-deps fastai==2.8.12 fastcore==2.2.39 fastprogress==1.1.6 fasttransform==0.0.5 \
	    'plum-dispatch<2.10' 'fastdownload>=0.0.8'
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$($(BENCH)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	$(BENCH)/bin/python -m pip install 'spacy<4' beartype rich tqdm sentencepiece 'python-fasthtml>=0.12.34'
	$(BENCH)/bin/python -c "import fastai.vision.all"
