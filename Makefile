# make setup    .venv with everything, in pinned versions
# make demo     train, export and stream the example recordings
# make test     the tests, against the installed wheel
# make check    ruff, mypy and the tests
# make docs     the site of docs/, in build/site; a link that leads nowhere is an error
# make js       what the client in JavaScript needs, by npm (Node 18 or newer)
# make triton-server   a Triton server for the tests that need one (55 MB, Linux on 64-bit x86)
# make format   let ruff write the code's form
# make clean    remove all that make has made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# By file, on all cores: what a file shares is made once. In the order of tests/conftest.py.
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder

# Folders stand beside files, so that a file that goes is noticed too.
SOURCES := $(shell find clients engine export training -path clients/js -prune -o \
    -not -name '*.pyc' -not -name __pycache__ -print)

DEPENDENCIES := $(VENV)/.dependencies
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test check lint typecheck docs js triton-server format clean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

demo: setup
	$(BIN)/hrpro demo

test: setup
	$(BIN)/pytest $(PYTEST_ARGS)

check: lint typecheck test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An installed copy, for only there engine/ is hrpro.engine.
typecheck: setup
	rm -rf build/typecheck
	$(PIP) install -q --no-deps --target build/typecheck build/wheel/*.whl
	cd build/typecheck && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
	    --cache-dir "$(CURDIR)/.mypy_cache" hrpro

docs: setup
	$(BIN)/properdocs build --strict --clean --config-file mkdocs.yml --site-dir build/site

# Prebuilt, from the lock file; nothing is compiled and no install script runs (clients/js/.npmrc).
js:
	cd clients/js && npm ci --no-audit --no-fund

# Beside the environment's packages: it asks for an older numpy, for what is not used here.
triton-server: $(DEPENDENCIES)
	$(PIP) install --no-deps --upgrade --target $(VENV)/triton-server -c constraints.txt nvidia-pytriton

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build hrpro-demo clients/js/node_modules *.egg-info .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEPENDENCIES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "'$(PYTHON)' cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation \
	    ".[camera,dashboard,dev,docs,extract,i3d,label,mqtt,sign,train,triton]"
	$(PIP) check
	touch $@

# build/lib and the egg-info would carry files into the wheel that are no longer there.
$(INSTALLED): $(DEPENDENCIES) $(SOURCES) LICENSE
	rm -rf build *.egg-info
	$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PIP) install -q --no-deps --force-reinstall build/wheel/*.whl
	rm -rf build/lib build/bdist.* *.egg-info
	touch $@
