# Two commands do everything on a fresh machine: `make demo` and `make test`.
# EMBEDDED=1 runs the demo without RabbitMQ and Redis, over their twins in memory.
.PHONY: help demo test bench fuzz setup lint services audit clean
.DEFAULT_GOAL := help

PYTHON ?= python3
DEVICE ?= cpu
VENV := .venv
LEAN := .venv-lean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.complete $(if $(EMBEDDED),,services) ## 100 models, one small device, one spike; ends with demo.png
	@$(VENV)/bin/python -m examples.demo $(if $(EMBEDDED),--embedded) $(DEMO_ARGS)

test: setup $(LEAN)/.complete ## lint, types, import contracts, all tests
	@scripts/test $(VENV) $(LEAN)

bench: $(VENV)/.complete ## all benchmarks on this machine; rewrites docs/results/benchmarks.md (DEVICE=cuda on a GPU)
	@for name in density swap oversubscribe engine overhead path connections spike goodput idle placer reality; do \
	  $(VENV)/bin/python -m benchmarks $$name --device $(DEVICE) --save || exit 1; done

fuzz: $(VENV)/.complete ## hostile bytes, searched by coverage: TARGET=all SECONDS=60 each
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[fuzz]'
	@$(VENV)/bin/python -m tests.fuzz $(or $(TARGET),all) --seconds $(or $(SECONDS),60)

lint: $(VENV)/.complete ## formatting, lint, types and import contracts only
	@scripts/lint $(VENV)

setup: $(VENV)/.complete services ## virtual environment, RabbitMQ and Redis, if missing

services:
	@scripts/services

$(VENV)/.complete: pyproject.toml constraints.txt
	@scripts/environment $(PYTHON) $(VENV) test

# Gateway, placer and shared are tested where torch cannot be imported.
$(LEAN)/.complete: pyproject.toml constraints.txt
	@scripts/environment $(PYTHON) $(LEAN) gateway,grpc,placer,cli,triton,test-lean

audit: $(VENV)/.complete ## known weaknesses of what images install (asks an advisory service)
	@deploy/audit $(VENV)

clean: ## what the two commands made (not the pushed models in .roost)
	rm -rf $(VENV) $(LEAN) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz
