# Every target works on a fresh clone with only Python (>= 3.11) and make. PYTHON=… picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine with an NVIDIA GPU, first: make install EXTRAS=gpu,dev (later targets keep what is installed)
DEFAULT_EXTRAS := cpu,dev
INSTALLED := $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*)))
EXTRAS ?= $(or $(INSTALLED),$(DEFAULT_EXTRAS))
CLIPS := $(if $(VIDEOS),--videos $(VIDEOS))
STAMP := $(VENV)/.installed-$(EXTRAS)

.PHONY: install demo test acceptance lint format bench bench-full clean

install: $(STAMP)

# One pip call, so that torch, torchvision and open_clip_torch are resolved together.
# Other extras than before start anew: faiss-cpu and faiss-gpu ship the same module.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "Python %d.%d found, 3.11 or newer needed: make PYTHON=python3.11" % v[:2])'
	@[ -e $@ ] || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(BIN)/rlt-retrieval demo --out demo_out

test: install
	$(BIN)/pytest

acceptance: install
	$(BIN)/pytest -m acceptance

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# make bench VIDEOS=my_videos/ takes the first 10 s of each of these; otherwise clips made on the spot
bench: install
	$(BIN)/python benchmarks/encode.py $(CLIPS)

# The benchmarks of cost that need no GPU, kept in benchmarks/results/: more than two hours on two cores with VIDEOS=…
bench-full: install
	$(BIN)/python benchmarks/encode.py $(CLIPS) --save
	$(BIN)/python benchmarks/encode.py $(CLIPS) --save --precision bf16
	$(BIN)/python benchmarks/encode.py $(CLIPS) --save --num-frames 8 --all --repeats 1
	$(BIN)/python benchmarks/tokenizer.py $(CLIPS) --save
	$(BIN)/python benchmarks/decode.py $(CLIPS) --save
	$(BIN)/python benchmarks/pipeline.py $(CLIPS) --save
	$(BIN)/python benchmarks/batching.py --save
	$(BIN)/python benchmarks/train_step.py $(CLIPS) --save
	$(BIN)/python benchmarks/search.py --save
	$(BIN)/python benchmarks/metrics.py --save

clean:
	rm -rf $(VENV) demo_out
