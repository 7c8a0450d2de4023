"""The public surface: what is exported exists, and importing the package loads nothing heavy."""

import subprocess
import sys

import pytest

import taopd

PACKAGES = (
    "kernels",
    "losses",
    "selectors",
    "signals",
    "models.gradient_window",
    "experiments.lab",
)


def test_exports_exist():
    for name in taopd.__all__:
        assert getattr(taopd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = taopd.nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_package_exports_exist(package):
    module = __import__(f"taopd.{package}", fromlist=["__all__"])
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_the_package_loads_no_torch():
    code = "import sys, taopd; print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
