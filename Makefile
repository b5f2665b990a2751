# `make demo` and `make test` set up all they need: a virtual environment of their own,
# made anew when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto

PY := $(VENV)/bin/python
DONE := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: demo compare test test-processes test-native lint types format fuzz mutants test-peers test-wheel test-clients bench compiled compiled-page test-flax accuracy docs notebook clean

demo: $(DONE)
	$(PY) examples/train_digits.py

compare: $(DONE)
	$(PY) examples/compare_norms.py

# A file's tests share what they compile, so that a worker gets whole files.
# `make test OPTIONS=--optimized` compiles as users do, `make test OPTIONS=--whole` takes
# every combination of what is combined; both take longer.
# `make test CHECKS=` leaves out what no compiler and no version changes.
OPTIONS ?=
CHECKS ?= lint types
test: $(DONE) $(CHECKS)
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(OPTIONS)

# Real processes that train together, are killed, hang, or are told to leave.
test-processes: $(DONE)
	$(PY) -m pytest -m processes -n 2

# The native kernels by themselves, on hostile shapes, under sanitizers of addresses and
# of what C++ leaves undefined.
test-native:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -pthread -fsanitize=address,undefined \
	  -fno-sanitize-recover=all -DNORMJAX_ISA=base -I normjax/kernels/native \
	  tests/native_sanitized.cc -o build/native_sanitized
	./build/native_sanitized

# Tests beside torch, Keras, Haiku and Equinox, all of which must be here. Of torch a
# build for CPUs alone is taken; its index is given as pip takes it, where pip does not
# know one: `make test-peers TORCH="torch --index-url URL"`.
TORCH ?= torch==2.13.0+cpu
test-peers: $(PEERS)
	$(PY) -c "import torch" 2>/dev/null || \
	  $(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	KERAS_BACKEND=jax $(PY) -c "import torch, keras, haiku, equinox"
	$(PY) -m pytest -n $(WORKERS) -m skipif tests/test_convert.py tests/test_files.py

# The wheel in an environment of its own: a smoke test beside the newest of what it needs,
# then, beside the oldest that pyproject.toml declares, that and some of the tests.
WHEEL := .venv-wheel
MINIMUM := tests/test_moments.py tests/test_linen.py tests/test_nnx.py tests/test_tools.py
test-wheel: $(DONE)
	rm -rf $(WHEEL) dist && $(PYTHON) -m venv $(WHEEL)
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd $(WHEEL) && bin/python ../tests/smoke.py
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check \
	  pytest pytest-xdist hypothesis $$($(PY) tests/smoke.py --oldest)
	cd $(WHEEL) && bin/python ../tests/smoke.py
	$(WHEEL)/bin/pytest -n $(WORKERS) --dist loadfile $(MINIMUM)

# Public models with their norms swapped, from checkouts under a folder, and every tool on
# each. `make test-clients` says which checkouts.
test-clients: $(DONE)
	$(PY) tests/clients.py $(CLIENTS)

# Faults put into normjax/ one at a time, and which test sees each: a sample, or with
# `make mutants MUTANTS="--all normjax/_axes.py"` every one of a file.
MUTANTS ?= --minutes 20
mutants: $(DONE)
	$(PY) tests/mutants.py $(MUTANTS)

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

# mypy reads the package; both read what a user writes, as a user's checker would.
types: $(DONE)
	$(PY) -m mypy
	$(PY) -m pyright --pythonpath $(PY)

format: $(DONE)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The peers of the benchmark come with their first use; torch is installed by hand.
# `make bench BENCH=--quick`, `make bench BENCH="--compare old.json"`.
BENCH ?=
bench: $(PEERS)
	$(PY) benchmarks/run.py $(BENCH)

$(PEERS): $(DONE)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

# What the compilers for a GPU and for TPUs make of the norms; none of them needs to be
# here, and nothing is run. `make compiled COMPILED=--quick`; the options are in the script.
# After `make compiled COMPILED="--json docs/compiled.json"`, which takes long,
# `make compiled-page` writes the page's tables and draws its picture.
COMPILERS := .venv-compilers
COMPILED ?=
compiled: $(COMPILERS)/.installed
	JAX_PLATFORMS=cpu PYTHONPATH="$(CURDIR)" $(COMPILERS)/bin/python \
	  benchmarks/compiled.py $(COMPILED)

compiled-page: $(DONE)
	$(PY) benchmarks/compiled_report.py docs/compiled.json docs/compiled.md
	$(PY) benchmarks/compiled_report.py docs/compiled.json docs/compiled.png

$(COMPILERS)/.installed: benchmarks/compilers.txt
	$(PYTHON) -m venv $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
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
	rm -rf $(VENV) $(COMPILERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
