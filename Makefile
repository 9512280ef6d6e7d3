# Every target sets up what it needs: `make demo` and `make test` are all a newcomer runs.
VENV ?= .venv
PORT ?= 8000
PYTHON := $(VENV)/bin/python
# Errors alone, and modules are compiled when they are first imported.
PIP_INSTALL := -m pip install -qq --no-compile
PYTEST := -m pytest -n auto
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo app check test test-lowest test-between test-newest test-upstream quality bench docs pictures
.PHONY: test-vllm serve checkpoint-code release-check newest clean

demo: $(VENV)/.installed
	OMP_NUM_THREADS=2 $(PYTHON) -m demo

app: $(VENV)/.installed-app
	OMP_NUM_THREADS=2 $(PYTHON) -m app

# ------------------------------------------------------------------------------------------------------------ tests

# Before every commit, in less than a minute: style, types, the algorithm, and answers of a tiny model.
check: quality
	$(PYTHON) $(PYTEST) -m "(algorithm or smoke) and not slow" tests/recoverable_llava

test: $(VENV)/.installed-app
	$(PYTHON) $(PYTEST) --dist loadfile --ignore tests/upstream

# All that rests on transformers alone runs on the lowest version that pyproject declares, the model on one in between.
test-lowest: $(VENV)-5.12.0/.installed
	$(VENV)-5.12.0/bin/python $(PYTEST) --dist loadfile -m "not algorithm" tests/recoverable_llava tests/hub_upload

test-between: $(VENV)-5.17.0/.installed
	$(VENV)-5.17.0/bin/python $(PYTEST) --dist loadfile tests/recoverable_llava/tools/test_combine.py \
		$(addprefix tests/recoverable_llava/test_,vision_features.py forward.py generation.py configuration.py warnings.py \
		image_tiles.py llava_next.py)

# On the newest transformers that there is today, so that what it renames is seen on the day.
test-newest: newest
	@echo "Testing on transformers $(call version_of_transformers,$(VENV)-newest)"
	$(VENV)-newest/bin/python $(PYTEST) --dist loadfile -m "not algorithm" --ignore tests/upstream --ignore tests/app
	$(call test_upstream,$(VENV)-newest)

# transformers' own tests over our classes, and over stock LLaVA as the control: tests/upstream/test_upstream.py.
test-upstream: $(VENV)/.installed
	$(call test_upstream,$(VENV))

define test_upstream
$(MAKE) --no-print-directory .cache/upstream/transformers-$(call version_of_transformers,$(1))/tests/__init__.py
$(1)/bin/python $(PYTEST) tests/upstream
endef

# vLLM in an environment of its own, as it decides the version of transformers.
test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python $(PYTEST) --dist loadfile tests/vllm_plugin

# An OpenAI server of the embedded checkpoint on this machine's CPU. (`vllm serve` crashes in the CPU build 0.32.0.) vLLM's
# sampler would compile two functions at their first use, which keeps the first client waiting for half a minute.
serve: $(VENV)-vllm/.installed
	TORCHDYNAMO_DISABLE=1 $(VENV)-vllm/bin/python -m vllm.entrypoints.launchers.api_server.entry --config vllm_plugin/cpu_server.yaml --port $(PORT)

quality: $(VENV)/.installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# ------------------------------------------------------------------------------------------------ figures and pages

bench: $(VENV)/.installed
	$(PYTHON) -m benchmarks

docs: $(VENV)/.installed-app
	$(PYTHON) -m mkdocs build --strict

# The pictures in README and docs, from the embedded checkpoint.
pictures: $(VENV)/.installed
	$(PYTHON) docs/scripts/pictures.py
	$(PYTHON) docs/scripts/architecture.py

# The remote code of the embedded checkpoints is that of the package, byte for byte, and of their family alone.
checkpoint-code: $(VENV)/.installed
	PYTHONPATH=. $(PYTHON) .ci/checkpoint_code.py

# Everything that must hold before a version is tagged; see CONTRIBUTING.md.
release-check: $(VENV)/.installed-app
	$(PYTHON) .ci/release_check.py

# ----------------------------------------------------------------------------------------------------- environments

# What transformers requires must follow its version; the rest is pinned everywhere.
FOLLOWING := transformers huggingface_hub tokenizers safetensors accelerate numpy
OTHERS = sed $(foreach package,$(FOLLOWING),-e '/^$(package)==/d') constraints.txt
PRINT_VERSION := from importlib.metadata import version; print(version('transformers'))
version_of_transformers = $(shell $(1)/bin/python -c "$(PRINT_VERSION)")

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) $(PIP_INSTALL) -c constraints.txt -e ".[dev,train,eval,bench]"
	touch $@

$(VENV)/.installed-app: $(VENV)/.installed
	$(PYTHON) $(PIP_INSTALL) -c constraints.txt -e ".[demo,docs]"
	touch $@

# The CPU build of torch is in PyTorch's index alone.
$(VENV)-vllm/.installed: pyproject.toml requirements-vllm.txt
	python3 -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(PIP_INSTALL) --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
		$$(grep ^torch== requirements-vllm.txt)
	$(VENV)-vllm/bin/python $(PIP_INSTALL) --no-deps -r requirements-vllm.txt
	$(VENV)-vllm/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)-%/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)-$*
	$(OTHERS) > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python $(PIP_INSTALL) -c $(VENV)-$*/constraints.txt "transformers==$*" -e ".[dev]"
	touch $@

# Asks for a newer release each time. By itself first: along with the rest pip would settle for an older one that fits.
newest:
	test -x $(VENV)-newest/bin/python || python3 -m venv $(VENV)-newest
	$(OTHERS) > $(VENV)-newest/constraints.txt
	$(VENV)-newest/bin/python $(PIP_INSTALL) --upgrade --no-deps transformers
	version=$$($(VENV)-newest/bin/python -c "$(PRINT_VERSION)") && \
	$(VENV)-newest/bin/python $(PIP_INSTALL) -c $(VENV)-newest/constraints.txt \
		"transformers==$$version" -e ".[dev,train,eval,bench]"

# The tests in the source distribution of a version. What imports them by path wants a package.
.cache/upstream/transformers-%/tests/__init__.py: $(VENV)/.installed
	$(PYTHON) -m pip download -qq --no-deps --no-binary transformers -d .cache/upstream transformers==$*
	tar -xzf .cache/upstream/transformers-$*.tar.gz -C .cache/upstream transformers-$*/tests
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* site build *.egg-info .cache
