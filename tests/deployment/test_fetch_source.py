"""A pinned source distribution is found in the package index, verified, unpacked; none of its code runs."""

from __future__ import annotations

import hashlib
import sys
import tarfile

import pytest
from conftest import ROOT

from qlora.cli import UserError

sys.path.insert(0, str(ROOT / "llama.cpp"))
import source
from settings import PackagedSource


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder with one source distribution; returns (folder, its pin)."""
    tree = tmp_path / "pkg-1.0" / "inner"
    tree.mkdir(parents=True)
    (tree / "CMakeLists.txt").write_text("project(inner)\n")
    (tmp_path / "pkg-1.0" / "setup.py").write_text("raise SystemExit('must not run')\n")
    page = tmp_path / "simple" / "the-pkg"
    page.mkdir(parents=True)
    archive = page / "pkg-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "pkg-1.0", "pkg-1.0")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (page / "index.html").write_text(
        f'<a href="../the-pkg/pkg-1.0.tar.gz#sha256={digest}">pkg-1.0.tar.gz</a>'
    )
    monkeypatch.setattr(
        source, "package_indexes", lambda: [f"file://{tmp_path}/nowhere", f"file://{tmp_path}/simple"]
    )
    return archive, PackagedSource("the-pkg", "pkg-1.0.tar.gz", digest, "pkg-1.0/inner")


def test_the_pinned_folder_is_unpacked_once(tmp_path, index):
    archive, pin = index
    target = source.fetch_source(pin, tmp_path / "out" / "source")
    assert [p.name for p in target.iterdir()] == ["CMakeLists.txt"]  # setup.py is outside of it
    archive.unlink()
    assert source.fetch_source(pin, target) == target


def test_a_truncated_file_is_refused_and_nothing_is_left(tmp_path, index):
    archive, pin = index
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="not the pinned file"):
        source.fetch_source(pin, tmp_path / "out" / "source")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_index_without_the_file_is_named(tmp_path, index):
    _, pin = index
    other = PackagedSource("the-pkg", "pkg-2.0.tar.gz", pin.sha256, pin.folder)
    with pytest.raises(UserError, match="the index does not have it"):
        source.fetch_source(other, tmp_path / "out" / "source")


def test_links_that_lead_out_of_the_archive_are_not_followed(tmp_path, index):
    archive, _ = index
    with tarfile.open(archive, "w:gz") as tar:
        evil = tarfile.TarInfo("pkg-1.0/inner/../../../escaped")
        tar.addfile(evil)
    pin = PackagedSource(
        "the-pkg", "pkg-1.0.tar.gz", hashlib.sha256(archive.read_bytes()).hexdigest(), "pkg-1.0/inner"
    )
    with pytest.raises((UserError, tarfile.TarError)):
        source.fetch_source(pin, tmp_path / "out" / "source")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "out" / "source").exists()
