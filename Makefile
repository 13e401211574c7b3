# make run: set up and do the main job. make test: set up and run the tests. Both can be repeated without harm.
PYTHON ?= python3
REVIEW ?= The plot is thin, but the actors are wonderful and I left the cinema with a smile.
OUT = qlora-out
BIN := .venv/bin
RESULTS := benchmarks/results
SLIDES := $(BIN)/python docs/slides/build.py
# As it was typed: quotes, dollars and backticks are the review's, not make's or the shell's.
override REVIEW := $(value REVIEW)
export REVIEW

.PHONY: run test figures course results slides help setup clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

run: .venv/installed  ## set up, fine-tune on IMDB (goes on where it stopped; does nothing if done), classify REVIEW="..."
	$(BIN)/python qlora_finetune.py --output-dir $(OUT) --resume
	$(BIN)/python qlora_inference.py --adapter $(OUT) "$$REVIEW"

test: .venv/tested  ## set up, run the tests (offline but for the package index)
	$(BIN)/python -m pytest

figures: .venv/tested  ## fill the measured numbers into README, docs and the notebook from benchmarks/results
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python notebooks/make_notebook.py
	$(BIN)/python notebooks/make_lessons.py

course: .venv/tested  ## all of the course from nothing: run the lessons, build the slides, check the claims
	$(BIN)/python benchmarks/figures.py --check
	$(BIN)/python notebooks/make_lessons.py --check
	rm -rf lesson-run course-run
	$(BIN)/python benchmarks/lessons.py --out course-run
	$(SLIDES)
	$(BIN)/python benchmarks/claims.py

# benchmarks/results.toml has what runs, in which order. `make`, not its variable: a line that has that one is
# run by `make -n`, too, and this one takes hours.
results: .venv/tested  ## measure again all that this machine can (many hours), then fill it in
	$(BIN)/python benchmarks/results.py; code=$$?; make figures && exit $$code

slides:  ## the course as slides: HTML and, with Chromium, PDF in docs/slides/build (needs Node.js)
	$(PYTHON) docs/slides/build.py

setup: .venv/installed  ## only make .venv and install requirements.txt into it

clean:  ## remove .venv and what a run wrote; models/ stays
	rm -rf .venv "$(OUT)" lesson-run course-run

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; this is $$($(PYTHON) --version 2>&1). Name another: make run PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/tested: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
