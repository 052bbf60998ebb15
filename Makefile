# Everything runs in .venv, which the first command makes: one installation, with exact versions.
PYTHON ?= python3.11
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # compiled modules are what makes hundreds of short processes start fast
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

.PHONY: install demo test test-slow smoke test-cluster lint types bench methods-table methods-doc notebook preflight \
	repro clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/fbi demo

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not smoke" --durations=25

# Whole runs: real processes and signals, damaged checkpoints, meshes of several devices, real models.
test-slow: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow --durations=25

# Every experiment and every notebook, shrunken to seconds a run.
smoke: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m smoke --durations=10

# Sweeps on a Ray of three nodes and a Slurm, both of this machine; as root on Debian, whose packages of Slurm it installs.
test-cluster: install
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[ray,slurm]'
	$(BIN)/python -m pytest -q --durations=10 tests/cluster

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if find tests -name 'test_*.py' -printf '%f\n' | sort | uniq -d | grep .; then \
		echo 'rename all but one of the test files above: pytest tells them apart by base name alone'; exit 1; fi

types: install
	$(BIN)/pyright

bench: install
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/quantizers.py --steps

# Every method at every bit-width, 300 steps each; a finished run is not run again.
methods-table: install
	$(BIN)/fbi sweep experiments/methods_table.py --launcher local:slots=2
	$(BIN)/python -m experiments.methods_table

# The published claims in miniature: at most 120 runs of about a minute on one core; finished ones are kept and count.
repro: install
	$(BIN)/python -m experiments.repro

methods-doc: install
	$(BIN)/python -m fbi.quant.catalogue > docs/methods.md

# The tour as a page; the tests run every notebook as the plain script that it is.
notebook: install
	$(BIN)/jupytext --to ipynb --set-kernel python3 --execute --output .cache/01_quantizers.ipynb notebooks/01_quantizers.py
	$(BIN)/jupyter nbconvert --to html --output-dir docs --output 01_quantizers .cache/01_quantizers.ipynb

# The paper-scale runs, compiled by the TPU's and the GPU's own compilers, which need neither; they are kept apart from
# .venv, where JAX would look for the devices. Entries that are there are kept: it goes on where it was.
COMPILERS := .cache/compilers
preflight: install
	test -d $(COMPILERS)/libtpu || $(BIN)/pip install -qq --disable-pip-version-check --no-deps --target $(COMPILERS) \
		libtpu==0.0.52 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
	PYTHONPATH=$(COMPILERS) $(BIN)/python -m fbi.preflight.book

clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
