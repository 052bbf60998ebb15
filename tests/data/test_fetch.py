import hashlib
import zipfile

import pytest

from fbi.data import fetch, registry
from fbi.errors import InputError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in a folder that pip takes for the whole registry."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tinydata/text.txt", "text")
        file.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        file.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_package_file_is_downloaded_once_and_kept(wheel, cache):
    expected = sha256(wheel)
    path = fetch("tinydata", "1.0", expected)
    assert path.name == wheel.name
    assert path.is_relative_to(cache / "packages")
    assert sha256(path) == expected
    wheel.unlink()
    assert fetch("tinydata", "1.0", expected) == path


def test_a_wrong_hash_a_missing_version_and_a_bad_hash_are_one_line_errors(wheel, cache):
    cases = [
        ("1.0", "0" * 64, f"the registry's tinydata==1.0 has sha256 {sha256(wheel)}, not 000"),
        ("2.0", sha256(wheel), "cannot download tinydata==2.0 with pip: ERROR: No matching distribution"),
        ("1.0", "abc", "must be 64 lower-case hex digits"),
    ]
    for version, digest, says in cases:
        with pytest.raises(InputError) as caught:
            fetch("tinydata", version, digest)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not cache.exists() or list((cache / "packages").iterdir()) == []


def test_a_missing_pip_and_a_silent_network_say_what_to_do():
    no_pip = registry._explain("a==1", "0" * 64, "/usr/bin/python: No module named pip\n")
    assert "ensurepip" in str(no_pip)
    offline = registry._explain("a==1", "0" * 64, "WARNING: Retrying (Retry(total=1))\nERROR: No matching\n")
    assert str(offline).endswith("ERROR: No matching; is the network reachable?")
    assert "pip said nothing" in str(registry._explain("a==1", "0" * 64, ""))


def test_a_python_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(InputError, match="cannot run pip to download a==1: No such file"):
        fetch("a", "1", "0" * 64)
