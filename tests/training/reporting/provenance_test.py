# SPDX-License-Identifier: Apache-2.0
"""What a run says of its code and of its config."""

import os
import pathlib
import subprocess
import urllib.parse
import urllib.request

import pytest

from localglobal_jax.training.reporting import provenance


def test_a_run_names_the_commit_of_its_code():
    root = pathlib.Path(provenance.__file__).parents[3]
    if not (root / ".git").exists():
        pytest.skip("the package is not in a checkout")
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert provenance.environment()["commit"].removesuffix("-dirty") == head.strip()


def test_a_commit_is_dirty_if_code_differs_not_if_results_do(tmp_path, monkeypatch):
    def git(*words):
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    def commit():
        return provenance.environment()["commit"]

    monkeypatch.setattr(provenance, "checkout", lambda: tmp_path)
    git("init")
    assert "commit" not in provenance.environment()  # there is none yet
    code, results = tmp_path / "code.csv", tmp_path / "experiments" / "a" / "grid.csv"
    results.parent.mkdir(parents=True)
    for file in (code, results):
        file.write_text("a\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit()
    assert len(clean) == 40
    results.write_text("b\n")
    (results.parent / "warmup.csv").write_text("new\n")
    assert commit() == clean
    git("add", ".")
    assert commit() == clean
    code.write_text("b\n")
    assert commit() == f"{clean}-dirty"
    git("commit", "-a", "-m", "second")
    assert len(commit()) == 40 and commit() != clean


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a study, a config at its top, and a folder without a page."""
    root = tmp_path / "a checkout"
    for file in ("studies/one/sweep.py", "studies/one/README.md", "bare/sweep.py", "top.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (root / "README.md").touch()
    monkeypatch.setattr(provenance, "checkout", lambda: root)
    return root


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("studies/one/sweep.py", "studies/one/sweep.py"),
        ("studies/one/sweep.py:size=tiny,init=a:b", "studies/one/sweep.py:size=tiny,init=a:b"),
        ("ROOT/studies/one/../one/sweep.py:a", "studies/one/sweep.py:a"),
        ("ROOT/../link/one/sweep.py", "studies/one/sweep.py"),
        ("./top.py", "top.py"),
        ("../mine.py:a", "../mine.py:a"),
        ("ROOT/../mine.py", "ROOT/../mine.py"),
        ("ROOT-2/mine.py", "ROOT-2/mine.py"),
        (os.fsdecode(b"../\xff.py"), "../?.py"),
    ],
)
def test_a_config_is_recorded_relative_to_the_checkout_or_as_given(
    given, recorded, checkout, monkeypatch
):
    monkeypatch.chdir(checkout)
    (checkout.parent / "link").symlink_to(checkout / "studies")
    given, recorded = (text.replace("ROOT", str(checkout)) for text in (given, recorded))
    assert provenance.environment(given)["config"] == recorded
    monkeypatch.setattr(provenance, "checkout", lambda: None)  # an installed package
    assert provenance.config_path(given) == given.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("folder", ["", "configs/"])
def test_a_packaged_config_is_that_of_the_checkout(folder, tmp_path, monkeypatch):
    if provenance.checkout() is None:
        pytest.skip("the package is not in a checkout")
    monkeypatch.chdir(tmp_path)
    found = provenance.config_path(f"{folder}coatnet_digits.py:size=tiny")
    assert found == "configs/coatnet_digits.py:size=tiny"


def test_a_run_without_a_config_file_records_none():
    assert "config" not in provenance.environment()


@pytest.mark.parametrize("folder", ["runs/a b", "studies/one", ".", "..", "../elsewhere"])
def test_the_page_of_a_study_is_linked_from_any_folder(folder, checkout):
    (checkout / folder).mkdir(parents=True, exist_ok=True)
    path, url = provenance.page_of("studies/one/sweep.py:size=tiny", checkout / folder)
    assert path == "studies/one/README.md"
    inside = not folder.startswith("..")
    assert urllib.parse.urlsplit(url).scheme == ("" if inside else "file")
    there = urllib.parse.urljoin((checkout / folder).as_uri() + "/report.html", url)
    file = urllib.request.url2pathname(urllib.parse.urlsplit(there).path)
    assert os.path.samefile(file, checkout / "studies/one/README.md")


def test_a_relative_link_holds_behind_a_symbolic_link(checkout):
    (checkout.parent / "disk").mkdir()
    (checkout / "runs").symlink_to(checkout.parent / "disk")
    _, url = provenance.page_of("studies/one/sweep.py", checkout / "runs")
    assert url.startswith("file:///")


@pytest.mark.parametrize(
    "config",
    [
        *("", ".", "..", "/", "top.py", "bare/sweep.py", "studies/one/gone.py", "studies/one"),
        *("../other/sweep.py", "studies/../../other/sweep.py", "OTHER/sweep.py"),
        *("\x00", "\ud7ff", "\udcff/x.py", "a" * 5000),
        *("javascript:alert(1)", "http://x.org/sweep.py", "//x.org/sweep.py"),
    ],
)
def test_nothing_else_is_linked(config, checkout):
    other = checkout.parent / "other"
    other.mkdir()
    (other / "README.md").touch()
    (other / "sweep.py").touch()
    assert provenance.page_of(config.replace("OTHER", str(other)), checkout) is None


def test_a_page_that_is_gone_is_not_linked(checkout, monkeypatch):
    (checkout / "studies/one/README.md").unlink()
    assert provenance.page_of("studies/one/sweep.py", checkout) is None
    (checkout / "studies/one/README.md").touch()
    assert provenance.page_of("studies/one/sweep.py", checkout)
    monkeypatch.setattr(provenance, "checkout", lambda: None)
    assert provenance.page_of("studies/one/sweep.py", checkout) is None
