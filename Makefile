# make run: set up and do the main job. make test: set up and run the tests. Both can be repeated without harm.
PYTHON ?= python3
REVIEW ?= The plot is thin, but the actors are wonderful and I left the cinema with a smile.
OUT ?= qlora-out
BIN := .venv/bin
RESULTS := benchmarks/results
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
	$(BIN)/python benchmarks/lessons.py --out course-run
	$(BIN)/python docs/slides/build.py
	$(BIN)/python benchmarks/claims.py

# One after the other: they want the machine to themselves. Parity needs llama.cpp/build.sh to have run.
results: .venv/installed  ## measure again (several hours; all but the longer run and its transfer), then fill it in
	@test ! -e qlora-out || { echo "error: move qlora-out/ away: the default run is measured from the start" >&2; exit 1; }
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/training_speed.py --sweep
	$(BIN)/python benchmarks/gradient_error.py
	$(BIN)/python benchmarks/young_adapters.py
	$(BIN)/python benchmarks/lora_variants.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/preferences.py
	$(BIN)/python benchmarks/watching.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/memory_prediction.py
	$(BIN)/python benchmarks/timings.py
	$(BIN)/python benchmarks/waiting.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/faults.py --cost
	$(BIN)/python benchmarks/injection.py
	$(BIN)/python quant_llama32_4bit_lora.py --output-dir $(RESULTS)/lab >$(RESULTS)/lab/demo.txt 2>&1
	$(BIN)/python quant_llama32_4bit_lora.py --output-dir $(RESULTS)/lab --compare fp32 bf16 int8 int8-dynamic int8-static \
	  w4a8 fp4 nf4 nf4-dq gptq awq int4 int4-g64 int4-sym int4-sym-g64 mxfp4 nvfp4 >$(RESULTS)/lab/compare.txt 2>&1
	$(BIN)/python benchmarks/rehearsal.py
	$(BIN)/python quant_llama32_4bit_lora.py --plan --gpus 2 --model llama-3.1-70b --batch-size 1 \
	  --gradient-checkpointing --output-dir quant-out-70b
	cp quant-out-70b/quantization.json $(RESULTS)/plan_70b.json
	$(MAKE) run >$(RESULTS)/default_run.log 2>&1
	cp qlora-out/report.json $(RESULTS)/default_run.json
	$(BIN)/python quant_llama32_4bit_lora.py --ledger --adapter qlora-out --output-dir quant-out \
	  >$(RESULTS)/lab/adapter_ledger.txt 2>&1
	$(BIN)/python qlora_inference.py --evaluate --shots 0 4 16 32 --eval-samples 100 >$(RESULTS)/shots.txt
	$(BIN)/python qlora_finetune.py --find-lr >$(RESULTS)/find_lr.txt
	$(BIN)/python qlora_finetune.py --preview --samples 400 >$(RESULTS)/preview.txt
	$(BIN)/python benchmarks/bias.py
	$(BIN)/python llama.cpp/parity.py --imatrix --eval-samples 200
	cp gguf-out/parity.json gguf-out/parity.md gguf-out/parity.png $(RESULTS)/parity/nf4/
	$(BIN)/python benchmarks/verdicts.py
	$(BIN)/python benchmarks/doctor.py
	$(BIN)/python benchmarks/qat.py
	$(BIN)/python qlora_finetune.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --output-dir q4-run --resume
	$(BIN)/python llama.cpp/parity.py --adapter q4-run --types Q8_0 --output-dir gguf-q4
	cp gguf-q4/parity.json gguf-q4/parity.md gguf-q4/parity.png $(RESULTS)/parity/q4_1/
	$(MAKE) figures

slides:  ## the course as slides: HTML and, with Chromium, PDF in docs/slides/build (needs Node.js)
	$(PYTHON) docs/slides/build.py

setup: .venv/installed  ## only make .venv and install requirements.txt into it

clean:  ## remove .venv and what a run wrote; models/ stays
	rm -rf .venv $(OUT)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; this is $$($(PYTHON) --version 2>&1). Name another: make run PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/tested: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
