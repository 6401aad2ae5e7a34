# `make quickstart` and `make test` do all their set-up themselves: virtual environment, requirements, this package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: install quickstart test test-fast check clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	grep -v '^pydensecrf2' requirements.txt > $(VENV)/without_crf.txt
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
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info
