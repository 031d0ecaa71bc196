# make demo       trains, tests and exports CS-Flow on real textures; pictures and a table in ./demo
# make check      runs format, lint, types, documentation, doctests and tests
# make slow       runs the tests that take long, and the notebooks
# make docs       builds the documentation in docs/_build/html
# make format     formats the code and fixes what the linter can fix
# make benchmark DATA=...  measures all detectors on a folder of data sets in MVTec AD's layout
# make long       runs the long form of the tests of docs/reliability.md: half an hour
# make floors     runs the tests with the oldest dependencies that pyproject.toml allows
# make newest     runs the tests with the newest ones
# Each creates the environment in .venv first. PIP_ARGS is passed to pip, for example an index of CPU builds (see README).

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN = $(VENV)/bin

DOCS = $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --nitpicky --fresh-env --write-all docs docs/_build/html

.PHONY: demo check slow docs format benchmark floors newest long
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m anomalib_csflow.demo demo

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(DOCS)
	$(BIN)/pytest -n 2 -m 'not slow and not long' --durations=15

slow: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 -m 'slow and not long' --durations=15
	$(BIN)/pytest -n 0 --nbmake notebooks

docs: $(VENV)/.installed-dev
	$(DOCS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(VENV)/.installed
	$(BIN)/python -m anomalib_csflow.benchmark --config configs/benchmark.yaml $(if $(DATA),--data $(DATA))

long: $(VENV)/.installed-dev
	$(BIN)/pytest -n 0 -m long tests

floors: requirements/floors.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-floors
	$(VENV)-floors/bin/pip install $(PIP_ARGS) -c requirements/floors.txt -e '.[openvino,onnx,offline,demo,cluster,benchmark,dev]'
	$(VENV)-floors/bin/pytest -n 0 -W ignore

newest: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/pip install $(PIP_ARGS) -e '.[openvino,onnx,offline,demo,cluster,benchmark,dev]'
	$(VENV)-newest/bin/pytest -n 0 -W ignore

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml requirements/constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install $(PIP_ARGS) -c requirements/constraints.txt -e '.[openvino,offline,demo,cluster,benchmark]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install $(PIP_ARGS) -c requirements/constraints.txt -e '.[openvino,onnx,offline,demo,cluster,benchmark,docs,dev]'
	touch $@
