# make run | chain | try | timeline | sgd | plots | clean
# make test | test-fast | lint | mutants
# make bench | bench-busy | bench-chain | bench-crashes | bench-delay | bench-growth | bench-load
#      bench-pace | bench-page | compare | digits | soak
# EPOCHS=20 sets the length of a run. PARTS="784-256 256-10" gives another chain.
# ARGS passes options on; ARGS=--help shows them. VENV=dir puts the virtual environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
EPOCHS ?= 8
PARTS ?= 2-24 24-12 12-1
BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# "broken" if an upgrade has taken the environment's Python or its packages. It is made again.
BROKEN := $(shell test ! -e $(VENV)/pyvenv.cfg || $(BIN)/python -c "" 2>/dev/null && { \
  test ! -e $(VENV)/ready || $(BIN)/python -c "import msgspec" 2>/dev/null; } || echo broken)

run: x.npy
	@$(BIN)/python -m plumbing.launch --draw x.npy y.npy --num-epochs $(EPOCHS) $(ARGS)

chain: x.npy
	@$(BIN)/python -m plumbing.launch --draw x.npy y.npy --num-epochs $(EPOCHS) --parts $(PARTS) $(ARGS)

try: EPOCHS = 4
try: x.npy
	@$(BIN)/python -m plumbing.experiments x.npy y.npy --num-epochs $(EPOCHS) $(ARGS)
	@echo "open try/learning_curves.png"

lint: $(VENV)/tests-ready
	$(BIN)/ruff check .

test: $(VENV)/tests-ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

test-fast: $(VENV)/tests-ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not processes" tests

mutants: $(VENV)/tests-ready
	$(BIN)/python -m tests.mutants $(ARGS)

sgd: x.npy
	$(BIN)/python sgd.py x.npy y.npy

plots: $(VENV)/ready
	$(BIN)/python plot.py

BENCHES = bench bench-busy bench-chain bench-crashes bench-delay bench-growth bench-load \
  bench-pace bench-page compare digits soak
$(BENCHES): x.npy $(VENV)/tests-ready
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$@) $(ARGS)

timeline: x.npy
	@$(BIN)/python -m plumbing.timeline x.npy y.npy $(ARGS)

x.npy: $(VENV)/ready
	test -e x.npy -o -e y.npy || $(BIN)/python generate.py

$(VENV)/ready: requirements.txt $(if $(BROKEN),always)
	$(PYTHON) plumbing/check_machine.py
	$(PYTHON) -m venv $(if $(BROKEN),--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/tests-ready: $(VENV)/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf progress progress.[0-9]* output_progress middle[0-9]*_progress middle_progress try \
	  sgd_progress sgd_progress.[0-9]* synthetic_plots learning.gif guesses.gif \
	  learning_curves.png timeline timeline.png .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

.PHONY: always run chain try timeline lint test test-fast mutants sgd plots clean $(BENCHES)
