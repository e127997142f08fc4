# Two commands for a fresh machine: `make demo` and `make test`. README.md has the pip commands.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Half of the tests, by the time they take. The two halves run at once: 14 minutes instead of 28.
HALF := tests/engines tests/registry tests/project

.PHONY: demo test half other-half format clean

demo: $(VENV)/plain
	$(BIN)/multiopt demo

test: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory --jobs=2 half other-half

half:
	$(BIN)/pytest $(PYTEST) $(HALF)

other-half:
	$(BIN)/pytest $(PYTEST) $(HALF:%=--ignore=%)

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# A file each says what the environment holds; everything holds the plain install too.
$(VENV)/plain: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'  # which knows dependency groups
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable '.[fast,torch,pyro,jax]'
	touch $@ $(VENV)/plain
