# Needs Python 3.11 or newer (with its venv module) and make; all else is installed into .venv.
# PYTHON chooses another interpreter, PYTEST_ARGS goes to pytest: make test PYTEST_ARGS="-k queue -x".
# WORKERS is how many processes share the tests; each has its own Redis, engine and registry.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
IMAGE ?= dispatcher
PYTEST_ARGS ?=
WORKERS ?= 2
CHAOS_ARGS ?=
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo dev check format test test-slow test-redis-matrix chaos chaos-flat bench image clean

help: ## List what make can do here
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv with everything in it; done once, and again when pyproject.toml changes

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv ## Show what it does, on this machine, in a minute
	$(BIN)/dispatcher demo

dev: venv ## Run everything in one process, to work with
	$(BIN)/dispatcher dev

check: venv ## Format, lint, types, layers, dead code, spelling, shell, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/codespell
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck .ci/run
	$(BIN)/hadolint docker/Dockerfile

format: venv ## Format, and mend what can be mended by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: venv ## Run the tests; what can't run here is skipped and said so
	$(BIN)/pytest -n $(WORKERS) -m "not slow" --durations=15 $(PYTEST_ARGS)

test-slow: venv ## Run the tests that take minutes
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

# On every server, also after one has failed, and then with a failure.
test-redis-matrix: venv ## Run the queue's tests on Redis 6.2, 8, the system's and Valkey
	@servers="$$($(BIN)/python -m tests.support.redis_servers)" || exit 1; \
	printf '%s\n' "$$servers" | { failed=; while read -r name server; do \
		printf '\n--- %s: %s\n' "$$name" "$$server"; \
		TEST_REDIS_SERVER="$$server" $(BIN)/pytest -n $(WORKERS) tests/queue $(PYTEST_ARGS) < /dev/null || failed="$$failed $$name"; \
	done; test -z "$$failed" || { printf '\nfailed on:%s\n' "$$failed"; exit 1; }; }

# One slice: it is added to docs/reliability/slices.jsonl, and the tables of docs/reliability.md are
# written anew from all slices. CHAOS_ARGS="--help" tells what can be chosen.
chaos: venv ## Kill, stop and cut what can be, for up to 20 minutes, and count what was lost
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

chaos-flat: venv ## See whether memory and descriptors stay flat over 100,000 tasks
	$(BIN)/python -m tests.chaos.flat $(CHAOS_ARGS)

# BENCH_ARGS: names of measures, --rounds N, --json PATH; "--help" lists them.
bench: venv ## Measure it beside what it could cost, as a table and as JSON; takes some minutes
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

image: ## Build the container image, named by IMAGE
	docker build --file docker/Dockerfile --tag $(IMAGE) .

clean: ## Delete all that was made here
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -type d -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
