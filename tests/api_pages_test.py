# SPDX-License-Identifier: Apache-2.0
"""The API pages: every public name has an entry, links lead somewhere, nothing is fetched.

Slow: `pip install -e '.[docs]' && python -m pytest -m slow tests/api_pages_test.py`.
"""

import html.parser
import importlib
import pathlib
import subprocess
import sys
import types

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ["", ".operators", ".blocks", ".models", ".inference.decoding", ".convert"]
OFFLINE = """
import runpy, socket, sys
def refuse(*args):
    raise AssertionError(f"a connection to {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
sys.argv = ["experiments/api_pages/build.py", sys.argv[1]]
runpy.run_path("experiments/api_pages/build.py", run_name="__main__")
"""


class Page(html.parser.HTMLParser):
    """The ids of a page, its links, what a browser would fetch, and the text of every entry."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched, self.text = set(), [], [], {}
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.add(given["id"])
        if tag in ("section", "div"):
            self._open.append((tag, given.get("id") if tag == "section" else given.get("class")))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "src" in given or tag == "link":
            self.fetched.append(given.get("src") or given["href"])

    def handle_endtag(self, tag):
        if tag in ("section", "div") and self._open:
            self._open.pop()

    def handle_data(self, data):
        entry = next((name for tag, name in self._open if tag == "section" and name), None)
        kind = next((name for tag, name in reversed(self._open) if tag == "div"), "") or ""
        if entry:
            found = self.text.setdefault(entry, {"signature": "", "docstring": ""})
            key = "docstring" if "docstring" in [n for _, n in self._open] else "signature"
            found[key if "attr" in kind or key == "docstring" else "signature"] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("pdoc", reason="needs the extra [docs]")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, out],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {str(f.relative_to(out)): Page(f.read_text()) for f in out.rglob("*.html")}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package, site):
    module = importlib.import_module(f"localglobal_jax{package}")
    page = site[f"localglobal_jax{package.replace('.', '/')}.html"]
    for name in module.__all__:
        found = getattr(module, name)
        if isinstance(found, types.ModuleType):
            assert f"{found.__name__.replace('.', '/')}.html" in site, name
            continue
        assert name in page.ids or name == "__version__", name
        if isinstance(found, types.FunctionType | type):
            assert "(" in page.text[name]["signature"], name
            assert ">>>" in page.text[name]["docstring"], name


def test_links_lead_somewhere_and_nothing_is_fetched(site):
    for name, page in site.items():
        for link in page.links:
            path, _, anchor = link.partition("#")
            if path.startswith("https://"):
                continue
            target = (pathlib.PurePosixPath("/", name).parent / path) if path else f"/{name}"
            parts = []
            for part in pathlib.PurePosixPath(target).parts[1:]:
                parts = parts[:-1] if part == ".." else [*parts, part]
            assert "/".join(parts) in site, f"{name}: {link}"
            assert not anchor or anchor in site["/".join(parts)].ids, f"{name}: {link}"
        assert all(url.startswith(("data:", "../", "./", "search.js")) for url in page.fetched)


def test_the_entries_show_our_fields_and_not_those_of_linen(site):
    text = site["localglobal_jax/operators.html"].text
    outlook = text["Outlook"]
    assert "features" in outlook["signature"] and "__call__" in outlook["signature"]
    assert "Float[Array," in outlook["signature"] and "jaxlib" not in outlook["signature"]
    for noise in ("parent", "_Sentinel", "scope", "weak refs"):
        assert not any(noise in "".join(found.values()) for found in text.values()), noise
