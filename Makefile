# Both targets set up what they need: a virtual environment under .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Nothing is compiled when it is installed: python keeps what it compiles, or every process would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-serve test types suite test-all mutants docs setup clean
demo: setup
	$(BIN)/surgery apply shapes --out out/shapes --force
	$(BIN)/surgery generate out/shapes "a red circle to the left of a blue square" "two green stars" \
		"a purple triangle and a yellow cross" --out out/demo.png --force

# A server on this machine, and OpenAI's client, which draws from it.
demo-serve: setup
	$(BIN)/surgery apply shapes --out out/shapes --force
	$(BIN)/python examples/openai_client.py out/shapes

# Types beside the tests: the checker alone would leave one of two cores idle.
test: setup
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(MAKE) --no-print-directory -j2 types suite

types: setup
	$(BIN)/basedpyright --project pyproject.toml --pythonpath $(BIN)/python

suite: setup
	OMP_NUM_THREADS=1 MKL_CBWR=AVX2,STRICT $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What `make test` samples, in full, which takes far longer.
test-all: setup
	OMP_NUM_THREADS=1 MKL_CBWR=AVX2,STRICT $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow"

# Whether the tests notice random changes to the code; an hour.
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	$(BIN)/python benchmarks/mutants.py

# The site, in out/site.
docs: setup
	$(BIN)/mkdocs build --quiet

setup: .venv/.ready

# The stamp is written last, so a set-up that was interrupted is done again.
.venv/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; set PYTHON=/path/to/python3.11 or newer"; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv || { echo "python3 -m venv failed (Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv out build *.egg-info
