# The commands of Tether. Each does its own set-up in .venv; `make help` lists them.

# The first of these that is Python 3.11 or newer. Another: make PYTHON=/path/to/python3 …
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PINS := pyproject.toml $(filter-out $(addprefix requirements/,browser.txt docs.txt pyright.txt release.txt),$(wildcard requirements/*.txt))

BACKENDS := jax torch tensorflow
# Only `make test BACKEND=jax` narrows a run; a BACKEND that happens to be in the environment does not.
ifeq ($(origin BACKEND),command line)
ifeq ($(filter $(BACKENDS),$(BACKEND)),)
$(error BACKEND=$(BACKEND) is not one of: $(BACKENDS))
endif
CHOSEN := $(BACKEND)
else
CHOSEN := $(BACKENDS)
endif

# The oldest Keras that is supported; the newest is pinned in requirements/test.txt. It is laid over the newest by
# PYTHONPATH, so that the rest of the environment is the same and nothing large is installed twice.
OLDEST_KERAS := 3.13.0
OLDEST := $(VENV)/oldest

# What Keras will be next, laid over it in the same way. Not pinned: `make nightly` gets the newest.
NIGHTLY := $(VENV)/nightly

# The demo runs on JAX unless KERAS_BACKEND says otherwise; the other backends come with the tests' set-up.
DEMO_BACKEND := $(or $(KERAS_BACKEND),jax)
DEMO_STAMP := $(if $(filter jax,$(DEMO_BACKEND)),$(VENV)/.demo-stamp,$(VENV)/.test-stamp)

# Two workers, one thread each; quiet; on the processor only.
WORKERS ?= 2
QUIET := TF_CPP_MIN_LOG_LEVEL=3
# What takes most of the time on JAX is XLA's compiling of small models: it optimises little, and both workers (and the
# next run) find what one of them has compiled. Without the emitters of fusions compiling takes a third less.
JAX_ENV := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS=--xla_cpu_use_fusion_emitters=false \
	JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/jax-cache \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# What pytest has made of the tests' assertions is kept for the other backends, also where the environment says otherwise.
TEST_ENV := $(QUIET) PYTHONDONTWRITEBYTECODE= CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	MKL_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 $(JAX_ENV)
PYTEST := $(PY) -m pytest --timeout 600
# More for pytest: make test BACKEND=jax PYTEST_ARGS='-k freeze -x'
PYTEST_ARGS ?=

.PHONY: help setup browser pyright demo docs test test-all oldest nightly lint types contracts format bench dist clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- set-up -----------------------------------------------------------------

setup: $(VENV)/.test-stamp ## make .venv with the package, three backends and the tools

$(PY):
	@test -n "$(PYTHON)" || { echo "Tether needs Python 3.11 or newer; none was found. Try: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-stamp: $(PINS) | $(PY)
	@echo "Installing what the demo needs in $(VENV) (about a minute)"
	@$(PIP) -c requirements/test.txt -e '.[demo]'
	@touch $@

$(VENV)/.test-stamp: $(PINS) | $(PY)
	@echo "Installing three backends and the tools in $(VENV) (some minutes)"
	@$(PIP) -r requirements/test.txt -e .
	@$(PIP) --no-deps -r requirements/test-nodeps.txt
	@touch $@

$(OLDEST)/.stamp-$(OLDEST_KERAS): | $(VENV)/.test-stamp
	@echo "Installing Keras $(OLDEST_KERAS) in $(OLDEST)"
	@rm -rf $(OLDEST)
	@$(PIP) --no-deps --target $(OLDEST) keras==$(OLDEST_KERAS)
	@touch $@

# The tests in a browser: Chromium comes from the system, what drives it (with a node of its own) from here.
browser: $(VENV)/.browser-stamp ## what the slow tests need to drive a browser; Chromium has to be there
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "The weight map is tested in Chromium, which was not found. On Debian: apt-get install chromium" >&2; exit 1; }

$(VENV)/.browser-stamp: requirements/browser.txt | $(VENV)/.test-stamp
	@$(PIP) -r requirements/browser.txt
	@touch $@

$(VENV)/.release-stamp: requirements/release.txt requirements/test.txt | $(PY)
	@$(PIP) -c requirements/test.txt -r requirements/release.txt

pyright: $(VENV)/.pyright-stamp ## what the slow tests need to ask pyright, the type checker of many editors

$(VENV)/.pyright-stamp: requirements/pyright.txt | $(VENV)/.test-stamp
	@$(PIP) -r requirements/pyright.txt
	@touch $@

$(VENV)/.docs-stamp: requirements/docs.txt | $(DEMO_STAMP)
	@$(PIP) -r requirements/docs.txt
	@touch $@

# ---- run --------------------------------------------------------------------

demo: $(DEMO_STAMP) ## train tied and untied autoencoders on real digits (KERAS_BACKEND=torch make demo for another backend)
	@KERAS_BACKEND=$(DEMO_BACKEND) $(QUIET) $(PY) -m tether.demo

docs: $(VENV)/.docs-stamp ## build the documentation site in site/ (offline, once its tools are installed), and check it
	@KERAS_BACKEND=$(DEMO_BACKEND) $(QUIET) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@$(PY) scripts/check_site.py

bench: $(VENV)/.test-stamp ## run benchmarks/*.py on each backend (BENCH=benchmarks/overhead.py BACKEND=jax for one)
	@for f in $(or $(BENCH),$(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))); do for b in $(CHOSEN); do \
		echo "== $$f, $$b"; KERAS_BACKEND=$$b $(QUIET) PYTHONPATH=. $(PY) $$f || exit 1; \
	done; done

# ---- check ------------------------------------------------------------------

# Runs pytest on each backend in turn, also on those after one that fails: a run takes long, and says all that it found.
# $(1): more arguments.
define on_each_backend
	@failed=; for b in $(CHOSEN); do \
		echo "== tests on $$b"; \
		KERAS_BACKEND=$$b $(TEST_ENV) $(PYTEST) -n $(WORKERS) $(1) $(PYTEST_ARGS) tests || failed="$$failed $$b"; \
	done; test -z "$$failed" || { echo "== failed on:$$failed" >&2; exit 1; }
endef

# The seam's tests on the oldest Keras; first, that it is the oldest which is imported. One process a backend, all at once,
# since these tests are one module; what each says is shown when all are through. $(1): more arguments.
define on_the_oldest_keras
	@failed=; export PYTHONPATH="$(CURDIR)/$(OLDEST)" $(TEST_ENV); trap 'kill 0' INT TERM; rm -f $(OLDEST)/*.passed; \
	for b in $(BACKENDS); do \
		{ export KERAS_BACKEND=$$b; \
		$(PY) -W ignore -c 'import keras; v = keras.__version__; assert v == "$(OLDEST_KERAS)", f"Keras {v} was imported"' && \
		$(PYTEST) $(1) tests/test_keras_seam.py && touch $(OLDEST)/$$b.passed; } >$(OLDEST)/$$b.log 2>&1 & \
	done; wait; \
	for b in $(BACKENDS); do \
		echo "== the seam on Keras $(OLDEST_KERAS), $$b"; cat $(OLDEST)/$$b.log; \
		test -e $(OLDEST)/$$b.passed || failed="$$failed $$b"; \
	done; test -z "$$failed" || { echo "== failed on:$$failed" >&2; exit 1; }
endef

ifeq ($(origin BACKEND),command line)
test: $(VENV)/.test-stamp
	$(call on_each_backend,--spread)
test-all: $(VENV)/.test-stamp browser pyright docs
	$(call on_each_backend,--run-slow)
else
test: lint types contracts $(OLDEST)/.stamp-$(OLDEST_KERAS) ## lint, types, contracts, tests on three backends and two Keras (BACKEND=jax: one backend's tests only)
	$(call on_each_backend,--spread)
	$(call on_the_oldest_keras)
test-all: browser pyright docs lint types contracts $(OLDEST)/.stamp-$(OLDEST_KERAS) ## the same with the slow tests
	$(call on_each_backend,--run-slow)
	$(call on_the_oldest_keras,--run-slow)
endif

oldest: $(OLDEST)/.stamp-$(OLDEST_KERAS) ## the seam's tests on the oldest Keras (part of `make test`)
	$(call on_the_oldest_keras)

# The warning that this Keras is not tested is let through. $(CHOSEN): all backends, or the one that BACKEND says.
nightly: $(VENV)/.test-stamp ## the seam's tests and a smoke test on the newest keras-nightly (not part of `make test`)
	@echo "Installing keras-nightly in $(NIGHTLY)"
	@rm -rf $(NIGHTLY)
	@$(PIP) --no-deps --pre --target $(NIGHTLY) keras-nightly
	@for b in $(CHOSEN); do \
		export PYTHONPATH="$(CURDIR)/$(NIGHTLY)" KERAS_BACKEND=$$b $(TEST_ENV); \
		$(PY) -W ignore -c 'import keras; v = keras.__version__; assert "dev" in v, f"Keras {v} was imported"; \
			print("== the seam and a smoke test on Keras", v, keras.backend.backend())' || exit 1; \
		$(PYTEST) -W 'ignore:Keras' $(PYTEST_ARGS) tests/test_smoke.py tests/test_keras_seam.py || exit 1; \
	done

lint: $(VENV)/.test-stamp ## ruff: rules and format
	@echo "== lint"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.test-stamp ## mypy, strict
	@echo "== types"
	@$(VENV)/bin/mypy

contracts: $(VENV)/.test-stamp ## the house's direction: who may import whom
	@echo "== contracts"
	@$(VENV)/bin/lint-imports --no-logo
	@$(PY) scripts/check_circles.py
	@$(PY) scripts/check_seam.py
	@$(PY) scripts/check_seam.py src/tether_cli
	@$(PY) scripts/check_seam.py src/tether_pytest

format: $(VENV)/.test-stamp ## let ruff mend what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# ---- release ----------------------------------------------------------------

# TAG=v0.1.0: also that this is the release of that tag. RELEASING.md says what comes before and after.
dist: $(VENV)/.release-stamp ## build the wheel and the sdist in dist/, check them, and test the wheel in an environment of its own
	@echo "== dist"
	@rm -rf dist
	@$(PY) -m build --no-isolation --outdir dist . >dist.log 2>&1 || { cat dist.log >&2; rm dist.log; exit 1; }; rm dist.log
	@$(PY) -m twine check --strict dist/*
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-actions action.yml
	@$(QUIET) $(PY) scripts/check_dist.py dist $(TAG)

clean: ## remove caches and outputs, keep .venv
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist site demo-output weights.html
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
