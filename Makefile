# Each target works from nothing on a fresh machine: it makes its own .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := collectives engine experiments kernels sim

.PHONY: demo test check format clean

demo: $(VENV)/ready
	$(BIN)/windtunnel demo --out out/demo

test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope

# mypy names a package after its folder, and the checkout may be called anything: it sees the rooms
# through a link named as the package is imported.
check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd $(VENV)/link && ../bin/mypy --cache-dir ../mypy --config-file windtunnel/pyproject.toml \
		-m windtunnel -m windtunnel.reading -m windtunnel.comm -m windtunnel.zero $(addprefix -p windtunnel.,$(ROOMS))

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	mkdir -p $(VENV)/link && ln -sfn ../.. $(VENV)/link/windtunnel
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
