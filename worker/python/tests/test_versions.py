"""Which releases of engines are supported is said in one place, and the guide says the same."""

import re

import pytest
from conftest import ROOT
from terrace_kv._versions import DISTRIBUTIONS, SUPPORTED, advice, installed

GUIDE = ROOT / "docs" / "engines"


def test_the_guide_has_the_same_releases() -> None:
    """A release is added to the code and not to the guide, or the other way."""
    guide = (GUIDE / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(([\w.]+).*?\) \| ([\d., ]+?) \|", guide, re.MULTILINE)
    table = {engine: tuple(releases.split(", ")) for engine, _, releases in rows}
    assert table == SUPPORTED
    assert all((GUIDE / page).is_file() for _, page, _ in rows)
    assert DISTRIBUTIONS.keys() == SUPPORTED.keys()


@pytest.mark.parametrize("engine", SUPPORTED)
def test_the_installed_release_is_supported(engine: str) -> None:
    """An engine was updated here, and its cases pass for a release that the table does not have."""
    version = installed(engine)
    if version is None:
        pytest.skip(f"{engine} is not installed: its release is not compared with the table")
    assert advice(engine, version) is None


def test_untried_versions_are_named() -> None:
    assert advice("vllm", "0.32.0") is None
    assert "was not tried" in (advice("vllm", "0.3") or "")
    assert "was not tried" in (advice("vllm", "0.320") or "")
    assert "unknown" in (advice("vllm", None) or "")
