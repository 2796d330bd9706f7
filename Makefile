# make demo: the whole method on real data in a few minutes. make test: the tests. Both need Python 3.11 and nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_STAMP := .venv/.installed-bench

.PHONY: help install demo test test-cluster test-slow lint format bench study campaign clean

help:
	@echo "make demo      run configs/digits.yaml and print its table and the path of its report"
	@echo "make test      run the tests, but for those of the next line"
	@echo "make test-cluster  clusters that lose nodes, jobs on them, a campaign of faults"
	@echo "make lint      ruff, pyright and the import rules"
	@echo "make format    let ruff rewrite what it can"
	@echo "make bench     time the walk, Ray, the store and the deformation models"
	@echo "make study     compare the methods on several data sets (long)"
	@echo "make campaign  kill runs at random moments and compare what they leave (long)"
	@echo "make clean     remove .venv and caches; runs/ stays"

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,bench]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fiberwalk run configs/digits.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 3 --dist loadgroup --no-loadscope-reorder

test-cluster: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m cluster

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_STAMP)
	$(BIN)/python -m tests.bench.bench_walk
	$(BIN)/python -m tests.bench.bench_scheduler
	$(BIN)/python -m tests.bench.bench_store
	$(BIN)/python -m tests.bench.bench_beside

study: $(BENCH_STAMP)
	$(BIN)/python tests/bench/study.py

campaign: $(STAMP)
	$(BIN)/python -m tests.bench.fault_campaign

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
