# `make demo` and `make test` set up all they need: a virtual environment of their own,
# made anew when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto

PY := $(VENV)/bin/python
DONE := $(VENV)/.installed

.PHONY: demo compare test test-processes lint types format fuzz bench test-flax accuracy docs notebook clean

demo: $(DONE)
	$(PY) examples/train_digits.py

compare: $(DONE)
	$(PY) examples/compare_norms.py

# A file's tests share what they compile, so that a worker gets whole files.
# `make test OPTIONS=--optimized` compiles as users do; it takes longer.
OPTIONS ?=
test: $(DONE) lint types
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(OPTIONS)

# Real processes that train together, are killed, hang, or are told to leave.
test-processes: $(DONE)
	$(PY) -m pytest -m processes -n 2

# Drawn calls of norms, then damaged files, half the time each: `make fuzz MINUTES=5`.
MINUTES ?= 60
SEED ?= 0
FUZZERS := $(wildcard tests/fuzz_norms.py tests/fuzz_files.py)
fuzz: $(DONE)
	status=0; for f in $(FUZZERS); do $(PY) $$f --seed $(SEED) --minutes \
	  $$(echo $(MINUTES) $(words $(FUZZERS)) | awk '{ print $$1 / $$2 }') || status=1; \
	done; exit $$status

lint: $(DONE)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DONE)
	$(PY) -m mypy

format: $(DONE)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The peers of the benchmark come with their first use; torch is installed by hand.
# `make bench BENCH=--quick`, `make bench BENCH="--compare old.json"`.
BENCH ?=
PEERS := $(VENV)/.peers
bench: $(PEERS)
	$(PY) benchmarks/run.py $(BENCH)

$(PEERS): $(DONE)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

# Flax's own tests of norms, from a checkout of Flax, on normjax's modules.
FLAX_TESTS := tests/linen/linen_test.py tests/nnx/nn/normalization_test.py
test-flax: $(DONE)
	@test -f "$(FLAX)/tests/linen/linen_test.py" || { echo "test-flax needs a checkout of \
	Flax. Got FLAX=$(FLAX). Type: make test-flax FLAX=path/of/flax"; exit 2; }
	cd "$(FLAX)" && PYTHONPATH="$(CURDIR)/tests" "$(abspath $(PY))" -m pytest -p swap_flax -q \
	  -p no:cacheprovider -c /dev/null --rootdir . $(FLAX_TESTS) \
	  -k "NormalizationTest or TestLinenConsistency"

accuracy: $(DONE)
	$(PY) benchmarks/accuracy.py

docs: $(DONE)
	$(PY) -m mkdocs build --strict

notebook: $(DONE)
	$(PY) notebooks/execute.py

$(DONE): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	"normjax needs Python 3.11 or newer. Got %d.%d. Type: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
