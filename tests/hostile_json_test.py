# SPDX-License-Identifier: Apache-2.0
"""JSON that is none, endless, or of another shape: an error that names the file, no traceback."""

import pytest

from localglobal_jax import configlib, conversion
from localglobal_jax.data import tokenizer

WRONG = [b"", b"null", b"5", b'"x"', b"[]", b"[" * 100_000, b"\xff", b'{"a": ', b"NaN",
         b'{"format": "dict", "files": []}', b'{"format": [], "files": {}}',
         b'{"format": "dict", "files": {"joint": 5}}', b'{"format": "dict", "files": {}}',
         b'{"task": 3}', b'{"model": {"name": 5}, "task": {"name": []}}']  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_it_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        configlib.read_json(file)
    (tmp_path / tokenizer.INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path} is damaged"):
        tokenizer.load(tmp_path)
    if not content.startswith(b'{"') or content.endswith(b": "):
        with pytest.raises(ValueError, match=r"--args.*(config\.json|cannot read)"):
            conversion.read_arguments(f"@{file}")


def test_words_are_read_from_their_own_folder_only(tmp_path):
    (tmp_path / "words.txt").write_text("a 1\n")
    (tmp_path / "run").mkdir()
    for path in ("../words.txt", str(tmp_path / "words.txt")):
        index = f'{{"format": "dict", "files": {{"joint": "{path}"}}}}'
        (tmp_path / "run" / tokenizer.INDEX).write_text(index)
        with pytest.raises(ValueError, match="damaged"):
            tokenizer.load(tmp_path / "run")
