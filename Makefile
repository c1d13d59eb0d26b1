# make demo   train all three methods on real data and compare them (CPU, about 10 minutes)
# make test   format, lint, strict types, tests
# Both make the same virtual environment in .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs clean

demo: $(READY)
	$(BIN)/python examples/prepare_aws.py --out demo/data
	$(BIN)/tunefork compare examples/01_route_requests.yaml --out demo/run
	@echo "Report: demo/run/report.html"

# Tests start some fifty processes: sources are compiled once, not by each of them.
test: check
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2

docs: $(READY)
	$(BIN)/python -m tunefork.documentation docs

# torch first and pinned: a looser request may fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,serve,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $(READY)

clean:
	rm -rf $(VENV) demo
