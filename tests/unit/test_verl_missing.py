"""What `import taopd.integrations.verl` says where verl is not installed."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from taopd.errors import ConfigError


def installed():
    try:
        return version("verl")
    except PackageNotFoundError:
        return None


@pytest.mark.skipif(installed() is not None, reason="verl is installed here")
def test_import_without_verl_is_one_message_with_the_version_to_install():
    with pytest.raises(
        ConfigError, match=r"needs verl, which is not installed: pip install verl==0"
    ):
        import taopd.integrations.verl  # noqa: F401


def test_the_parent_package_imports_without_verl():
    import taopd.integrations

    assert "verl" not in dir(taopd.integrations) or installed()
