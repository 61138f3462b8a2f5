PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check format clean

# The main job: trains, swaps, fine-tunes and samples; leaves pictures, checkpoints and a table under runs/.
demo: $(VENV)/installed
	$(BIN)/python train_scripts/demo.py

# All tests; those marked slow as well where CI is set.
test: export OMP_WAIT_POLICY = PASSIVE  # two test processes on two cores: waiting threads sleep, not spin
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 $(if $(CI),--run-slow)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The CompVis code that the tests swap into comes without what it depends on: tests need its UNet alone.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("slicemod needs Python 3.11 or newer, got " + sys.version.split()[0] + "; call make with PYTHON=python3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/python -m pip install --no-deps --constraint constraints.txt stable-diffusion-sdkit
	touch $@

clean:
	rm -rf $(VENV) runs
