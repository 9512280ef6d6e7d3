# Every target sets up what it needs: `make demo` and `make test` are all a newcomer runs.
VENV ?= .venv
PORT ?= 8000
PYTHON := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS ?= 1

.PHONY: demo app test test-lowest test-between test-vllm serve quick quality bench docs pictures checkpoint-code clean

demo: $(VENV)/.installed
	OMP_NUM_THREADS=2 $(PYTHON) -m demo

app: $(VENV)/.installed-app
	OMP_NUM_THREADS=2 $(PYTHON) -m app

test: $(VENV)/.installed-app
	$(PYTHON) -m pytest -n auto --dist loadfile

# All that touches transformers runs on the lowest version that pyproject declares, and the model on one in between, too.
test-lowest: $(VENV)-5.12.0/.installed
	$(VENV)-5.12.0/bin/python -m pytest -n auto --dist loadfile tests/recoverable_llava tests/hub_upload

test-between: $(VENV)-5.17.0/.installed
	$(VENV)-5.17.0/bin/python -m pytest -n auto --dist loadfile tests/recoverable_llava/tools/test_combine.py \
		$(addprefix tests/recoverable_llava/test_,vision_features.py forward.py generation.py configuration.py)

# vLLM in an environment of its own, as it decides the version of transformers.
test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest -n auto --dist loadfile tests/vllm_plugin

# An OpenAI server of the embedded checkpoint on this machine's CPU. (`vllm serve` crashes in the CPU build 0.32.0.)
serve: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m vllm.entrypoints.launchers.api_server.entry --config vllm_plugin/cpu_server.yaml --port $(PORT)

quick: $(VENV)/.installed
	$(PYTHON) -m pytest -n auto --dist loadfile -m "not slow" tests/recoverable_llava

quality: $(VENV)/.installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(VENV)/.installed
	$(PYTHON) -m benchmarks

docs: $(VENV)/.installed-app
	$(PYTHON) -m mkdocs build --strict

# The pictures in README and docs, from the embedded checkpoint.
pictures: $(VENV)/.installed
	$(PYTHON) docs/scripts/pictures.py

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[dev,train,eval,bench]"
	touch $@

$(VENV)/.installed-app: $(VENV)/.installed
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[demo,docs]"
	touch $@

# The CPU build of torch is in PyTorch's index alone.
$(VENV)-vllm/.installed: pyproject.toml requirements-vllm.txt
	python3 -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -q --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
		$$(grep ^torch== requirements-vllm.txt)
	$(VENV)-vllm/bin/python -m pip install -q --no-deps -r requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(VENV)-%/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)-$*
	sed '/^transformers==/d; /^huggingface_hub==/d; /^tokenizers==/d' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python -m pip install -q -c $(VENV)-$*/constraints.txt "transformers==$*" -e ".[dev]"
	touch $@

# The remote code of the embedded checkpoint is that of the package, byte for byte.
checkpoint-code:
	for file in checkpoints/tiny/*.py; do cp recoverable_llava/$$(basename $$file) $$file; done

clean:
	rm -rf $(VENV) $(VENV)-* site build *.egg-info
