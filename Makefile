# make train: set up, then the quickstart on real input. make test: set up, then the checks of a change.
# make test-all: every check.
# Needs Python 3.11 or later and a package index; no GPU, no data.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# One thread a process: on a small network two gain nothing and, where another program wants a core, wait
# for it at every operator (10x slower, benchmarks/NOTES.md). The evaluation shares its images out instead.
PROCESSES = $$($(BIN)/python -c 'import os, torch; print(torch.cuda.device_count() or min(os.cpu_count(), 2))')
train: export OMP_NUM_THREADS = 1

.PHONY: train picture test test-all lint clean

train: .venv/installed
	$(BIN)/python -m fastgn.train --recipe quickstart_natural --resume auto
	$(BIN)/python -m fastgn.train --recipe quickstart_gradnorm --resume auto
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m fastgn.evaluate \
		--checkpoint runs/quickstart_natural runs/quickstart_gradnorm --eps 0.025 --attacks clean pgd-20 autoattack \
		--output runs/quickstart.json --picture runs/quickstart.png

# Draws the README's picture from the networks that `make train` has trained.
picture: .venv/installed
	$(BIN)/python -m fastgn.evaluate --checkpoint runs/quickstart_natural runs/quickstart_gradnorm \
		--eps 0.025 --attacks clean --num-images 4 --output runs/picture.json \
		--picture docs/quickstart.png --picture-images 4

# On all cores. The first run is of the Triton kernels themselves, interpreted on the CPU. The second
# runs whatever the first one finds, so that its long summary comes last. A failure of either is make's.
PYTEST = $(BIN)/pytest -n auto --dist worksteal
test: lint
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/kernels; first=$$?; $(PYTEST) -m "not slow" && exit $$first

# Also the tests that take long and show little that the others do not.
test-all: lint
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels; first=$$?; $(PYTEST) && exit $$first

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "fastgn needs Python 3.11 or later: make PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
