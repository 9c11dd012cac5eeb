# make book    the pages, from chapters that run on this machine        make test   everything that CI runs
# make bench   what attribution costs, here and now                    make results MODEL=...  full-size runs (hours)
# make adapter trains the refusal adapter again                        make clean  removes what was built
# Each can be interrupted and run again: what is done is skipped. Another Python: make book PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := smollm2-135m-refusal
STRIP := --keep-id --extra-keys "metadata.papermill metadata.widgets cell.metadata.papermill"

# Threads that wait for work sleep: by default they spin, and on cores that others use as well that costs tenfold.
export OMP_WAIT_POLICY ?= passive

.PHONY: book test bench results adapter model clean

book: $(READY) model
	@$(BIN)/python book/tools/run_chapters.py --profile book
	@$(BIN)/python book/tools/build_pages.py --profile book

test: $(READY)
	@echo "== lint: ruff and nbstripout"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify $(STRIP) notebooks/*.ipynb
	@$(MAKE) --no-print-directory model
	@$(BIN)/python book/tools/run_chapters.py --profile smoke
	@$(BIN)/python book/tools/build_pages.py --profile smoke
	@echo "== tests"
	@$(BIN)/python -m pytest -ra -n auto --dist loadfile

model: $(READY)
	@echo "== the model: $(MODEL)"
	@$(BIN)/python -W ignore::RuntimeWarning -m steerutils.weights $(MODEL)

bench: $(READY) model
	@$(BIN)/python book/tools/bench.py

results: $(READY)
	@$(BIN)/python book/tools/results.py $(MODEL) $(ARGS)

adapter: $(READY)
	$(BIN)/python -m steerutils.teaching

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; ok = (3, 11) <= v < (3, 14); \
	  sys.exit(0 if ok else "Python 3.11, 3.12 or 3.13 is needed and $(PYTHON) is %d.%d: run make again with, for example, PYTHON=python3.12" % v[:2])'
	@echo "== setting up $(VENV): a virtual environment with the book's dependencies (some minutes, once)"
	@grep -qs "^version = $$($(PYTHON) -c 'import platform; print(platform.python_version())')$$" $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,dev]"
	@touch $@

clean:
	rm -rf $(VENV) _build
