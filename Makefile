# make run | test | sgd | plots | clean
# make bench | bench-long | bench-depth | bench-growth | bench-load | bench-crashes | bench-page | compare | soak
# ARGS=--help shows a benchmark's options. EPOCHS=20 sets the length of a run, VENV=dir puts the virtual environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
EPOCHS ?= 16
BIN = $(VENV)/bin

run: x.npy
	@$(BIN)/python -m tests.processes --num-epochs $(EPOCHS)
	@$(BIN)/python plot.py
	@echo "open learning.gif, learning_curves.png and synthetic_plots/"

test: $(VENV)/ready
	$(BIN)/python -m pytest -q tests

sgd: x.npy
	$(BIN)/python sgd.py x.npy y.npy

plots: $(VENV)/ready
	$(BIN)/python plot.py

BENCHES = bench bench-long bench-depth bench-growth bench-load bench-crashes bench-page compare soak
$(BENCHES): x.npy
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$@) $(ARGS)

x.npy: $(VENV)/ready
	test -e x.npy -a -e y.npy || $(BIN)/python generate.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf progress progress.old sgd_progress sgd_progress.old synthetic_plots learning.gif learning_curves.png target.png \
	  x.npy y.npy compare bench_depth __pycache__ tests/__pycache__ tests/benchmarks/__pycache__ .pytest_cache .hypothesis

.PHONY: run test sgd plots clean $(BENCHES)
