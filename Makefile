# `make quickstart` and `make test` do all their set-up themselves: virtual environment, requirements, this package.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= $(VENV)/oldest
OLDEST_TESTS ?= test-fast
BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
# Test files that take a few seconds each, one or more for every folder of the code.
SMOKE := imports habits base unet deeplabv1 deeplabv3plus inference crf metrics report data datasets transforms \
	check compare examples decode files outputs polygons trust

.PHONY: install quickstart test test-fast test-smoke test-oldest check clean

install: $(VENV)/installed

# BOUNDS edits requirements.txt; `make test-oldest` turns each lower bound into the version to install.
$(VENV)/installed: requirements.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	sed -e '/^pydensecrf2/d' $(BOUNDS) requirements.txt > $(VENV)/without_crf.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/without_crf.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@$(BIN)/python -m pip install --quiet 'pydensecrf2>=1.1' 2> $(VENV)/crf.log \
		|| echo 'pydensecrf2 did not build (it needs g++, see $(VENV)/crf.log): everything but DenseCRF works'
	@touch $@

quickstart: install
	$(RUN) lightning fit --config configs/quickstart.yaml
	$(RUN) lightning test --config configs/quickstart.yaml --ckpt_path best
	$(RUN) lightning predict --config configs/quickstart.yaml --ckpt_path best \
		--writer.output_dir logs/quickstart/predictions --writer.overwrite true
	@cat "$$(ls -t logs/quickstart/version_*/report.txt | head -n 1)"

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m 'not slow'

test-smoke: install
	$(PYTEST) -m 'not slow' $(SMOKE:%=tests/test_%.py)

test-oldest:
	$(MAKE) VENV=$(OLDEST) BOUNDS="-e 's/>=\([^,]*\).*/==\1.*/'" $(OLDEST_TESTS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info
