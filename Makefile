# Everything a newcomer needs is `make demo` and `make test`; both build .venv from requirements.lock themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs bench backbones soak install lock clean

demo: install  ## the whole way on data that needs no download
	$(BIN)/penult demo -o demo --overwrite

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## what is generated in docs/: the keys of job files, the options of commands, the layouts of images
	$(BIN)/python docs/reference.py

bench: install  ## minutes; writes the tables of many pages of docs/
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/pixels.py
	$(BIN)/python benchmarks/ridge.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/leaks.py
	$(BIN)/python benchmarks/splits.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/promises.py
	$(BIN)/python benchmarks/finetuning.py

backbones: install  ## about an hour; exports every torchvision network and rewrites the table of docs/backbones.md
	$(BIN)/python benchmarks/backbones.py

soak: install  ## hours; layouts and damage of images (docs/images.md), every fault (docs/reliability.md), optimisers, a million rows (docs/large.md)
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/holes.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/optimisers.py

install: .venv/installed

# An interrupted installation leaves no stamp, so the next call starts over from a clean folder.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "penult needs Python 3.11 or newer; set PYTHON=python3.x"; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock:  ## refresh requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes --no-header --upgrade -q -o requirements.lock

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
