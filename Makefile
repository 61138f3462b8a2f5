PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION ?= 2.9.1# of PyTorch, for test-torch: the oldest that slicemod takes

.NOTPARALLEL:  # a benchmark beside another measures both

.PHONY: demo test test-slow test-torch check gpu-check gpu-table format docs benchmarks benchmarks-gpu figures hosts-table clean

# The main job: trains, swaps, fine-tunes and samples; leaves pictures, checkpoints and a table under runs/.
demo: $(VENV)/installed
	$(BIN)/python train_scripts/demo.py

# Two test processes on two cores: waiting threads sleep, not spin.
test test-slow test-torch gpu-check: export OMP_WAIT_POLICY = PASSIVE
# `make test-slow UNTIL=...`, in seconds since 1970: tests that have not begun by then are left out and counted.
PYTEST = python -m pytest -n 2 $(if $(UNTIL),--until $(UNTIL))

# The fast tests, a file at a time, which shares what it has set up.
test: $(VENV)/installed
	$(BIN)/$(PYTEST) --dist loadfile

# The tests marked slow, and the property tests with more examples.
test-slow: $(VENV)/installed
	$(BIN)/$(PYTEST) --dist loadfile --run-slow -m "slow or hypothesis"

# The core tests at another version of PyTorch, in an environment of its own:
#     make test-torch VERSION=2.11.0 PYTHON=python3.12
TORCH_VENV = build/torch-$(VERSION)-$(notdir $(PYTHON))
NOT_CORE := $(foreach part,training bench planning,tests/$(part) slicemod/$(part)) \
	$(foreach part,cli commands_in_documents docs_site packaging,tests/test_$(part).py)
# Of the slow tests those in which versions differ most.
COMPILED := $(addprefix tests/,test_compiled.py test_graph_operators.py feed_forward/test_layer.py)
test-torch: $(TORCH_VENV)/installed
	$(TORCH_VENV)/bin/python -c 'import sys, torch; print("PyTorch", torch.__version__, "on Python", sys.version)'
	$(TORCH_VENV)/bin/$(PYTEST) --dist loadfile $(addprefix --ignore=,$(NOT_CORE))
	$(TORCH_VENV)/bin/$(PYTEST) --dist loadfile --run-slow -m slow $(COMPILED)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What can be known of the Triton kernels without a GPU: they are interpreted on the CPU and compared with attention in
# float64, and compiled for cards that are not here.
gpu-check: export TRITON_CACHE_DIR = $(CURDIR)/build/triton
gpu-check: $(VENV)/installed
	TRITON_INTERPRET=1 $(BIN)/$(PYTEST) -q tests/kernels/triton/test_interpreted.py
	$(BIN)/$(PYTEST) -q --gpu-check tests/kernels/triton/test_compiled.py

# The table of what the Triton kernels compile to, into docs/hardware.md.
gpu-table: export TRITON_CACHE_DIR = $(CURDIR)/build/triton
gpu-table: $(VENV)/installed
	$(BIN)/python -m tests.kernels.triton.compiled --into docs/hardware.md

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site under build/docs.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "built: build/docs/index.html"

# Measures what README and docs show, for some twenty minutes on an idle machine, and shows it there. Each line is a
# target of its own as well, such as `make benchmark-unet figures`. They are of the built-in table, as without a
# `slicemod tune` on this machine. `MACHINE=-avx2` keeps the figures of another machine beside the ones there are.
BENCH = SLICEMOD_TABLE=built-in $(BIN)/slicemod bench --json docs/benchmarks/$(@:benchmark-%=%)$(MACHINE).json
benchmarks: benchmark-layers benchmark-peers benchmark-unet benchmark-growth benchmark-calls benchmark-compiled figures
benchmark-layers: $(VENV)/installed
	$(BENCH) --largest 8 --dtype float32 bfloat16 float16 --rounds 5 --peers sdpa slicemod
benchmark-peers: $(VENV)/installed
	$(BENCH) --largest 1 --dtype float32 bfloat16 --rounds 5 --peers sdpa full diffusers-sliced 'memory-*' slicemod slicemod-exact
benchmark-unet: $(VENV)/installed
	$(BENCH) --work sd15-unet --dtype float32 bfloat16 --mode inference --rounds 3 --peers sdpa diffusers-sliced slicemod slicemod-whole
benchmark-growth: $(VENV)/installed
	$(BENCH) --growth --dtype float32 bfloat16 --rounds 3 --peers sdpa slicemod
benchmark-calls: $(VENV)/installed
	$(BENCH) --work calls --dtype float32 bfloat16 --rounds 5 --peers sdpa slicemod
benchmark-compiled: $(VENV)/installed
	$(BENCH) --compile --largest 3 --dtype float32 bfloat16 --rounds 5 --peers sdpa slicemod

# The same on a GPU, for ten minutes at most: first whether every kernel is exact there and keeps to its plan.
benchmarks-gpu: $(VENV)/installed
	-timeout 240 $(BIN)/python -m pytest -q tests/on_cuda --junit-xml docs/benchmarks/gpu-tests.xml
	$(BIN)/slicemod bench --device cuda --largest 2 --resolution 512 1024 --dtype float16 --rounds 5 --minutes 2 \
		--peers sdpa full diffusers-sliced ldm 'memory-*' slicemod slicemod-triton slicemod-exact \
		--json docs/benchmarks/gpu-layers.json
	$(BIN)/slicemod bench --device cuda --work sd15-layers sdxl-layers --largest 3 --resolution 512 1024 2048 \
		--dtype float16 bfloat16 --rounds 5 --minutes 2 --peers 'sdpa*' flex xformers slicemod slicemod-triton slicemod-exact \
		--json docs/benchmarks/gpu-backends.json
	$(BIN)/slicemod bench --device cuda --work calls --resolution 512 1024 --dtype float16 bfloat16 --rounds 5 --minutes 1 \
		--peers 'sdpa*' slicemod slicemod-triton slicemod-exact --json docs/benchmarks/gpu-calls.json
	$(BIN)/slicemod bench --device cuda --largest 2 --resolution 1024 --dtype float16 --rounds 5 --minutes 1 --compile \
		--peers sdpa slicemod slicemod-triton --json docs/benchmarks/gpu-compiled.json
	$(BIN)/slicemod bench --device cuda --work sd15-unet --resolution 512 1024 --dtype float16 --mode inference --rounds 5 --minutes 1 \
		--peers sdpa diffusers-full diffusers-sliced ldm slicemod slicemod-triton --json docs/benchmarks/gpu-unet.json

# The pictures and tables of README and docs from docs/benchmarks/*.json.
figures: $(VENV)/installed
	rm -rf docs/images/benchmarks
	$(BIN)/slicemod bench --render README.md docs/benchmarks.md

NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.exit("slicemod needs Python 3.10 or newer, got " + sys.version.split()[0] + "; call make with PYTHON=python3.10 or newer" if sys.version_info < (3, 10) else 0)'

# The page on diffusers' model classes, of which it runs small ones for some ten minutes. DIFFUSERS: a checkout of
# diffusers' sources, whose tests have most of the configurations. Three classes need torchvision.
hosts-table: $(VENV)/installed
	$(BIN)/python -m tests.diffusers_classes $(DIFFUSERS)

# The CompVis code that the tests swap into comes without what it depends on: tests need its UNet alone.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[train,dev,docs]'
	$(BIN)/python -m pip install --no-deps --constraint constraints.txt stable-diffusion-sdkit
	touch $@

$(TORCH_VENV)/installed: pyproject.toml constraints-oldest.txt
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --constraint constraints-oldest.txt torch==$(VERSION) --editable '.[train,test]'
	$(TORCH_VENV)/bin/python -m pip install --no-deps --constraint constraints-oldest.txt stable-diffusion-sdkit
	touch $@

clean:
	rm -rf $(VENV) runs build
