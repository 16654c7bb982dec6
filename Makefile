# make demo   set up .venv and run the main job: SFT, DPO and GRPO of a small model, with scores and samples after each
# make test   set up .venv, lint, and run the tests
# make test-compat  the hooks of posttrain.enable() with the oldest and newest transformers, PEFT and TRL that they take
#             (TRL_TESTS=path/to/trl/tests runs TRL's own tests, too; TRL=1.10.0 names their release)
# make bench  set up .venv, measure every op and step, say what moved since the committed run, and compare with peers
# make gpu    on a machine with a CUDA GPU: build, GPU tests, benchmarks; results as JSON in $OUT or bench/results

TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml build_backend.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: install demo test test-compat lint bench gpu clean

install: $(STAMP)

$(VENV)/.dependencies: requirements.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(STAMP): $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . \
	  -Ccmake.define.POSTTRAIN_EMULATION=ON
	touch $@

demo: install
	$(BIN)/python examples/demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-compat: install
	$(BIN)/python tests/compat/environments.py $(if $(TRL_TESTS),--trl-tests $(TRL_TESTS)) $(if $(TRL),--trl $(TRL))

bench: install
	$(BIN)/posttrain bench
	$(BIN)/python -m pytest bench -k "not test_case"

# Without .venv (a GPU machine whose own python has torch), the package is built for that python.
gpu:
	bash bench/gpu.sh

clean:
	rm -rf $(VENV) .compat build dist runs
