# make run | test | sgd | plots | clean
# make bench | bench-busy | bench-crashes | bench-depth | bench-growth | bench-load | bench-page | bench-staleness
#      compare | digits | soak
# ARGS=--help shows a benchmark's options. EPOCHS=20 sets the length of a run, VENV=dir puts the virtual environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
EPOCHS ?= 16
BIN = $(VENV)/bin

run: x.npy
	@$(BIN)/python -m plumbing.launch x.npy y.npy --num-epochs $(EPOCHS)
	@$(BIN)/python plot.py
	@echo "open learning.gif, learning_curves.png and synthetic_plots/"

test: $(VENV)/tests-ready
	$(BIN)/python -m pytest -q -n 2 tests

sgd: x.npy
	$(BIN)/python sgd.py x.npy y.npy

plots: $(VENV)/ready
	$(BIN)/python plot.py

BENCHES = bench bench-busy bench-crashes bench-depth bench-growth bench-load bench-page bench-staleness compare digits soak
$(BENCHES): x.npy $(VENV)/tests-ready
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$@) $(ARGS)

x.npy: $(VENV)/ready
	test -e x.npy -a -e y.npy || $(BIN)/python generate.py

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/tests-ready: $(VENV)/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf progress progress.[0-9]* output_progress sgd_progress sgd_progress.[0-9]* synthetic_plots learning.gif \
	  learning_curves.png target.png x.npy y.npy benchmarks .pytest_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

.PHONY: run test sgd plots clean $(BENCHES)
