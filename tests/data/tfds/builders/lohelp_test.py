# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.data.tfds.builders import debian, lohelp
from localglobal_jax.data.tfds.prepare import prepare

PAGE = """<!DOCTYPE html><html><head><title>No</title></head><body><p id="bm_system">no</p>
<h1 id="hd_id1" dir="auto">{0}</h1>
<div><p id="par_id2" class="paragraph">{1}<br>in <span class="emph">two</span>
 lines &amp; more</p></div>
<p id="par_id3">Press <span id="swlnsys_1" class="switchinline"><span hidden="true" id="MACx"
 class="MAC"><span class="keycode">Command</span></span><span hidden="true" id="defaulttext"><span
 class="keycode">Ctrl</span></span></span><span class="keycode">+F</span> {2}.</p>
<p id="par_id4">Use <span class="switchinline"><span hidden="true" id="WRITERx">texts</span><span
 hidden="true" id="CALCx">tables</span></span> {3}.</p></body></html>"""


def test_a_page_becomes_paragraphs():
    """One variant of several, line breaks as blanks, nothing but paragraphs and headings."""
    assert lohelp.Page(PAGE.format("Head", "Text", "now", "here")).paragraphs == [
        ("hd_id1", "Head"),
        ("par_id2", "Text in two lines & more"),
        ("par_id3", "Press Ctrl+F now."),
        ("par_id4", "Use texts here."),
    ]


@settings(deadline=None)
@given(st.text(st.sampled_from("<>/&;\"'= spanpidhr_123\n!-"), max_size=200))
def test_no_page_is_too_broken_to_read(junk):
    for name, text in lohelp.Page(f'<p id="par_id1">{junk}').paragraphs:
        assert name.startswith(("par_", "hd_")) and text == " ".join(text.split())


def write(folder, page, *paragraphs):
    path = folder / "text" / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'<p id="{key}">{text}</p>' for key, text in paragraphs))


@pytest.fixture
def help_pages(tmp_path):
    """Forty pages of three sentences in English and German."""
    root = tmp_path / "help"
    for n in range(40):
        for folder, a, b in (("en-US", "Open the file", "Close"), ("de", "Die Datei öffnen", "Zu")):
            write(root / folder, f"guide/{n}.html", ("par_id1", f"{a} {n}"), ("hd_id2", b))
    return root


def test_paragraphs_meet_by_id(tmp_path):
    en, de = tmp_path / "en", tmp_path / "de"
    write(en, "a.html", ("par_1", "one"), ("par_2", "two"), ("par_9", "twice"), ("par_9", "again"))
    write(de, "a.html", ("par_2", "zwei"), ("par_1", "eins"), ("par_9", "doppelt"))
    write(en, "only.html", ("par_1", "lost"))
    write(en, "b.html", ("par_9", "x"), ("par_9", "y"))
    write(de, "b.html", ("par_9", "X"), ("par_9", "Y"))
    assert list(lohelp.align(en / "text", de / "text")) == [
        ("a.html", "one", "eins"),
        ("a.html", "two", "zwei"),
        ("b.html", "x", "X"),
        ("b.html", "y", "Y"),
    ]


def test_every_pair_left_out_has_a_reason():
    good = ("Opens the document.", "Öffnet das Dokument.")
    pairs = {
        "source seen before": ("OPENS the document.", "Macht es auf."),
        "not translated": ("SELECT name FROM table", "SELECT name FROM table"),
        "one word or none": ("Insert", "Etwas einfügen"),
        "more than 250 words": ("a b " * 130, "a c " * 130),
        "one side 2.5 times as long": ("Close it now", "Das alles hier machen Sie jetzt bitte zu"),
        "hardly any letters": ("Ctrl + 1 + 2 + 3 + 4", "Strg + 1 + 2 + 3 + 4"),
    }
    kept, counts = lohelp.clean(lohelp.Pair("p", *p) for p in [good, *pairs.values(), good])
    assert kept == [("p", *good)]
    assert counts.pop("aligned") == 8
    assert counts.pop("kept") == 1
    assert counts.pop("left out: source seen before") == 2
    assert counts == {f"left out: {reason}": 1 for reason in list(pairs)[1:]}


def test_whole_pages_go_to_one_split(help_pages, tmp_path):
    counts = prepare("lohelp_translate/en-de", str(tmp_path / "tfds"), str(help_pages))
    assert counts["aligned"] == 80
    assert counts["left out: one word or none"] == 40
    assert counts["kept"] == 40 == counts["train"] + counts["validation"] + counts["test"]
    assert counts["validation"] > 0 and counts["test"] > 0
    found = {}
    for split in ("train", "validation", "test"):
        read = tfds.data_source("lohelp_translate/en-de", split=split, data_dir=tmp_path / "tfds")
        assert len(read) == counts[split]
        for example in read:
            assert lohelp.split_of(example["page"].decode()) == split
            found[example["en"].decode()] = example["de"].decode()
    assert found == {f"Open the file {n}": f"Die Datei öffnen {n}" for n in range(40)}
    assert prepare("lohelp_translate/en-de", str(tmp_path / "tfds")) == counts  # no source needed


def test_killed_while_preparing(help_pages, tmp_path):
    code = """
import os, signal, sys
from localglobal_jax.data.tfds.builders import lohelp
from localglobal_jax.data.tfds.prepare import prepare
lohelp.LohelpTranslate._generate_examples = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
prepare("lohelp_translate/en-de", *sys.argv[1:])
"""
    arguments = [str(tmp_path / "tfds"), str(help_pages)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL
    assert not list((tmp_path / "tfds").rglob("dataset_info.json"))
    assert prepare("lohelp_translate/en-de", *arguments)["kept"] == 40
    assert not list((tmp_path / "tfds").rglob("incomplete.*"))


def test_missing_pages_are_an_error_that_names_the_packages(help_pages, tmp_path, monkeypatch):
    message = "en-US/text.*libreoffice-help-en-us and libreoffice-help-fr.*--source"
    with pytest.raises(ValueError, match=r"fr/text.*libreoffice-help-fr"):
        prepare("lohelp_translate/en-fr", str(tmp_path / "tfds"), str(help_pages))
    assert not (tmp_path / "tfds").exists()
    monkeypatch.setattr(debian, "fetch", lambda packages, directory: None)
    monkeypatch.setattr(lohelp, "INSTALLED", pathlib.PurePosixPath(tmp_path / "nowhere"))
    monkeypatch.setattr(debian.Files, "find", lambda self, config, staging: None)
    with pytest.raises(ValueError, match=message):
        prepare("lohelp_translate/en-fr", str(tmp_path / "tfds"))
    assert not list((tmp_path / "tfds").rglob("dataset_info.json"))


def test_packages_are_fetched_where_one_language_is_installed(help_pages, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(debian, "fetch", lambda packages, directory: asked.append(packages))
    files = debian.Files(lohelp.packages, pathlib.PurePosixPath(help_pages), lohelp.locate)
    assert files.find("en-de", tmp_path) == str(help_pages) and not asked
    assert files.find("en-fr", tmp_path) is None
    assert asked == [lohelp.packages("en-fr")]


def test_a_page_that_is_no_utf8_is_named(help_pages, tmp_path):
    (help_pages / "de/text/guide/7.html").write_bytes(b'<p id="par_id1">\xf6ffnen</p>')
    with pytest.raises(ValueError, match=r"guide/7.html is not UTF-8"):
        prepare("lohelp_translate/en-de", str(tmp_path / "tfds"), str(help_pages))


def test_debian_gives_up_quietly(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert debian.fetch(["any"], tmp_path / "a") is None
    monkeypatch.setattr(shutil, "which", lambda name: name)

    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert debian.fetch(["any"], tmp_path / "b") is None


@pytest.mark.slow
@pytest.mark.parametrize("pair", lohelp.PAIRS)
def test_the_real_ones_from_debian(tmp_path, pair):
    """Needs Debian's packages, or apt-get and a network."""
    if not pathlib.Path(lohelp.INSTALLED).is_dir() and not shutil.which("apt-get"):
        pytest.skip("no apt-get here")
    counts = prepare(f"lohelp_translate/{pair}", str(tmp_path))
    assert counts["kept"] > 25_000
    assert counts["validation"] > 1000 and counts["test"] > 1000
    assert counts["aligned"] == counts["kept"] + sum(
        n for key, n in counts.items() if key.startswith("left out")
    )
