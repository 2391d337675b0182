# Each target starts from git, make and Python >= 3.11 alone and makes the virtual environment that it needs.
#
#   make demo      generates text with the model in the repository, on 8 simulated CPU devices
#   make test      runs the tests on CPU; one file: make test ARGS=tests/test_config.py
#   make test-tpu  compiles for TPUs; needs no TPU
#   make lint      checks style and formatting
#   make wheel     builds dist/*.whl
#   make clean     removes the environments and everything built
#
# Settings: PYTHON, VENV, VENV_TPU, ARGS (further flags of the demo, arguments of pytest).

VENV ?= .venv
VENV_TPU ?= .venv-tpu
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-tpu lint wheel clean

demo: $(VENV)/installed
	$(VENV)/bin/python -m launch.generate --config=configs/demo.py --simulate_devices=8 --mesh=data:2,model:4 \
		--temperature=0.8 --top_p=0.95 --seed=1 $(ARGS)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-tpu: $(VENV_TPU)/installed-test-tpu
	TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu $(VENV_TPU)/bin/python -m pytest -m tpu_compiler tests/tpu $(ARGS)

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

wheel: $(VENV)/installed-build
	rm -rf build
	$(VENV)/bin/python -m build --wheel

clean:
	rm -rf .venv .venv-tpu build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing that a new environment gets.
%/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv and ensurepip was found on the PATH." \
		"Install one (on Debian and Ubuntu also python3-venv), or name one: make PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $*

# The stamps are empty files: what is in an environment, and since when.
%/installed: setup.py pyproject.toml | %/bin/pip
	$*/bin/python -m pip install -q -e .
	@touch $@

%/installed-test: setup.py pyproject.toml | %/bin/pip
	$*/bin/python -m pip install -q -e '.[test]'
	@touch $@

%/installed-test-tpu: setup.py pyproject.toml | %/bin/pip
	$*/bin/python -m pip install -q -e '.[test,tpu]'
	@touch $@

%/installed-lint: setup.py pyproject.toml | %/bin/pip
	$*/bin/python -m pip install -q -e '.[lint]'
	@touch $@

%/installed-build: | %/bin/pip
	$*/bin/python -m pip install -q build
	@touch $@

.PRECIOUS: %/bin/pip
