# SPDX-License-Identifier: Apache-2.0
"""JSON that is none, endless, or of another shape: an error that names the file, no traceback."""

import pytest

from localglobal_jax.config import loading
from localglobal_jax.convert import files
from localglobal_jax.data.text import tokenizers

WRONG = [b"", b"null", b"5", b'"x"', b"[]", b"[" * 100_000, b"\xff", b'{"a": ', b"NaN",
         b'{"format": "dict", "files": []}', b'{"format": [], "files": {}}',
         b'{"format": "dict", "files": {"joint": 5}}', b'{"format": "dict", "files": {}}',
         b'{"task": 3}', b'{"model": {"name": 5}, "task": {"name": []}}']  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_it_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        loading.read_json(file)
    (tmp_path / tokenizers.INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        tokenizers.load(tmp_path)
    if not content.startswith(b'{"') or content.endswith(b": "):
        with pytest.raises(ValueError, match="--args"):
            files.read_arguments(f"@{file}")


def test_words_are_read_from_their_own_folder_only(tmp_path):
    (tmp_path / "words.txt").write_text("a 1\n")
    (tmp_path / "run").mkdir()
    for path in ("../words.txt", str(tmp_path / "words.txt")):
        index = f'{{"format": "dict", "files": {{"joint": "{path}"}}}}'
        (tmp_path / "run" / tokenizers.INDEX).write_text(index)
        with pytest.raises(ValueError, match=str(tmp_path / "run")):
            tokenizers.load(tmp_path / "run")
