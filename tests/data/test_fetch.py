"""Pinned wheels, fetched with pip from a directory of this test's own."""

import dataclasses
import hashlib
import zipfile

import pytest

from lora_jax.data import fetch


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel that pip finds in a directory, and nowhere else; it names a dependency that does not exist."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "lora_jax_test_wheel-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "lora_jax_test_wheel-1.2.3.dist-info"
        archive.writestr("pkg/data/sub/a.txt", "a")
        archive.writestr("pkg/data/b.txt", "b")
        archive.writestr("pkg/code.py", "raise SystemExit")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: lora-jax-test-wheel\nVersion: 1.2.3\nRequires-Dist: lora-jax-nothing\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return fetch.Package("lora-jax-test-wheel", "1.2.3", hashlib.sha256(wheel.read_bytes()).hexdigest(), "pkg/data")


def files(directory):
    return {str(file.relative_to(directory)): file.read_text() for file in directory.rglob("*") if file.is_file()}


def test_fetch_once(package, tmp_path, monkeypatch):
    directory = fetch.fetch(package)
    assert directory == fetch.location(package) == tmp_path / "cache" / "lora_jax" / "lora-jax-test-wheel-1.2.3"
    assert files(directory) == {"sub/a.txt": "a", "b.txt": "b"}
    assert [entry.name for entry in fetch.cache_directory().iterdir()] == [directory.name]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch.fetch(package) == directory  # from the cache now


def test_another_wheel_is_refused(package):
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(fetch.FetchError, match=f"SHA-256 {package.sha256}, not the pinned 000"):
        fetch.fetch(other)
    assert list(fetch.cache_directory().iterdir()) == []


def test_pip_fails(package):
    missing = dataclasses.replace(package, version="9.9.9")
    with pytest.raises(fetch.FetchError, match=r"pip could not download lora-jax-test-wheel==9\.9\.9: ERROR"):
        fetch.fetch(missing)
    assert list(fetch.cache_directory().iterdir()) == []


def test_cache_directory_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_directory() == tmp_path / ".cache" / "lora_jax"
