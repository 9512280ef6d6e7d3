"""Upstream's own tests: the mixins in the source distribution of the installed transformers.

`make test-upstream` unpacks that distribution; nothing of it is in this repository. It is not complete: what the mixins
import from files that it lacks is made here, and no more than that. Where a file is there after all, it is used.
"""

import importlib
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import transformers


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / f".cache/upstream/transformers-{transformers.__version__}/tests"
PACKAGE = "upstream_tests"

if not (FOLDER / "__init__.py").is_file():
    raise FileNotFoundError(f"{FOLDER} is missing: `make test-upstream` unpacks upstream's tests.")


def add_module(name: str, *, folders: tuple[Path, ...] | None = None, **contents: Any) -> None:
    """A module with these contents, or a package with these folders, unless one of that name can be imported."""
    if importlib.util.find_spec(name) is not None:
        return
    spec = ModuleSpec(name, None, is_package=folders is not None)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    if folders is not None:
        sys.modules[name].__path__ = [str(folder) for folder in folders]
    vars(sys.modules[name]).update(contents)


def local_picture(url: str) -> str:
    """Upstream downloads its pictures; the tests that run here want any picture."""
    return str(ROOT / "demo/scene.png") if url.endswith((".png", ".jpg")) else url


# A package of its own: the name "tests" is ours.
add_module(PACKAGE, folders=(FOLDER,))
for name in ("exporters", "generation", "utils"):
    add_module(f"{PACKAGE}.{name}", folders=())
# Upstream's tests of `generate` and of the export are not in the distribution: these two mixins are without tests.
add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
add_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
# Read for configurations without parts alone.
add_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
add_module("fetch_hub_objects_for_ci", url_to_local_path=local_picture)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # of kernels and accelerators
    ConfigTester = importlib.import_module(f"{PACKAGE}.test_configuration_common").ConfigTester
    GenerationTesterMixin = importlib.import_module(f"{PACKAGE}.generation.test_utils").GenerationTesterMixin
    ModelTesterMixin = importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
    ProcessorTesterMixin = importlib.import_module(f"{PACKAGE}.test_processing_common").ProcessorTesterMixin
