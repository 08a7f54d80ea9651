# SPDX-License-Identifier: Apache-2.0
"""BLEU and chrF of translations, by sacreBLEU, in total and by length of the source.

BLEU of plain text (the default) is comparable between systems with the same signature. The MUSE
paper reports BLEU of tokenised text: words separated by blanks, no smoothing, as in fairseq.

BLEU counts words. The default tokenizer, 13a, finds words between blanks and punctuation. Chinese,
Japanese, Thai and some others have no blanks: a sentence would be one word, and BLEU about 0. They
need a tokenizer of their own, see `BY_LANGUAGE`.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from sacrebleu import metrics

from localglobal_jax.config.validation import unknown

log = logging.getLogger(__name__)
# Tokenizers of sacreBLEU. flores101 and flores200 are downloaded when they are first used; ja-mecab
# and ko-mecab need the extras [ja] and [ko].
TOKENIZERS = (
    *("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores101", "flores200", "none"),
)
WITHOUT_WORDS = ("13a", "intl", "none")  # find no words in text without blanks
LANGUAGES = {  # as ISO 639 has them, in two letters and in three
    "zh": ("zh", "zho", "chi", "cmn", "yue"),
    "ja-mecab": ("ja", "jpn"),
    "ko-mecab": ("ko", "kor"),
    # Thai, Lao, Khmer, Burmese, Tibetan, Dzongkha
    "char": ("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod", "dz", "dzo"),
}
BY_LANGUAGE = {code: name for name, codes in LANGUAGES.items() for code in codes}
# Characters of scripts without blanks: most words of the first have at most 3, of the others 9
IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SYLLABLES = r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
LONGEST_WORDS = {IDEOGRAPHS: 3, SYLLABLES: 9}
EXAMINED = 1000  # lines, to find out whether a text has blanks

# Source words, first and last (arXiv 1911.09483, figures 2 and 7)
BUCKETS = ((0, 15), (16, 30), (31, 45), (46, 60), (61, 75), (76, 90), (91, 105), (106, None))


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    tokenized: bool = False,
    tokenize: str = "13a",
) -> dict[str, Any]:
    """Computes BLEU and chrF of translations, one reference each, in percent.

    ``tokenized``: the text is tokenised already, with words separated by blanks; else
    ``tokenize`` is one of `TOKENIZERS`. With ``sources``, ``by_length`` lists both scores per
    bucket of source words (see `words`); buckets without sentences are left out. Logs a warning if
    the tokenizer finds no words in the references. Raises ValueError if the numbers of lines
    differ, or are 0, and for a tokenizer that is unknown or not installed.
    """
    given = {"hypotheses": hypotheses, "references": references}
    if sources is not None:
        given["sources"] = sources
    if len({len(lines) for lines in given.values()}) > 1:
        sizes = ", ".join(f"{len(lines)} {name}" for name, lines in given.items())
        raise ValueError(
            f"the numbers of lines differ: {sizes}. Give files whose lines i belong together"
        )
    if not hypotheses:
        raise ValueError(
            "0 hypotheses: there is nothing to score. Give files with at least one line"
        )
    check_tokenizer(tokenize)
    if (better := tokenizer_of(references)) and (tokenized or tokenize in WITHOUT_WORDS):
        log.warning(
            "warning: the references have no blanks between words, and the tokenizer %s does not "
            "find any: this BLEU means nothing. Take %s (--tokenize, or task.bleu_tokenizer)",
            "none" if tokenized else tokenize,
            better,
        )
    options: dict[str, Any] = {"tokenized": tokenized, "tokenize": tokenize}
    result = {"sentences": len(hypotheses), **_scores(hypotheses, references, **options)}
    if sources is not None:
        result["by_length"] = by_length(hypotheses, references, sources, **options)
    return result


def compound_split(lines: Sequence[str]) -> list[str]:
    """Returns tokenised lines with hyphens between words as tokens: "a-b" is "a ##AT##-##AT## b".

    As in the ``compound_split_bleu.sh`` of fairseq, and the published numbers of En-De: of
    "a-b-c", where b is one character, only the first hyphen is split.
    """
    return [re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line) for line in lines]


def tokenizer_of(lines: Sequence[str]) -> str | None:
    """Returns the tokenizer for text without blanks between words; None for other text."""
    text = " ".join(lines[:: -(-len(lines) // EXAMINED) or 1])
    letters = sum(map(str.isalpha, text))
    for script, longest in LONGEST_WORDS.items():
        inside = [len(re.findall(f"[{script}]", word)) for word in text.split()]
        found = [count for count in inside if count]
        if sum(found) > 0.3 * letters and sum(found) > longest * len(found):
            if script == SYLLABLES:
                return "char"
            return "ja-mecab" if len(re.findall("[\u3040-\u30ff]", text)) > 0.05 * letters else "zh"
    return None


def language_of(name: str) -> str | None:
    """Returns the language in "zh", "zh_CN" or "zh-Hant-TW"; None for other words ("my_test")."""
    found = re.fullmatch(r"([A-Za-z]{2,3})([-_]([A-Z]{2}|[A-Z][a-z]{3}))*", name)
    return found[1].lower() if found else None


def choose_tokenizer(language: str | None, references: Sequence[str]) -> str:
    """Returns the tokenizer for a target language, such as "zh" or "ja_JP"; None: for the text.

    Where MeCab is not installed, the tokenizer is "char", and a warning says so.
    """
    code = re.split(r"[-_]", (language or "").lower())[0]
    name = BY_LANGUAGE.get(code) or tokenizer_of(references) or "13a"
    try:
        check_tokenizer(name)
    except ValueError as error:
        log.warning("warning: BLEU counts characters: %s", error)
        return "char"
    return name


def check_tokenizer(name: str) -> None:
    """Raises ValueError unless sacreBLEU has this tokenizer, and what it needs is installed."""
    if name not in TOKENIZERS:
        raise unknown("tokenizer of BLEU:", name, TOKENIZERS)
    try:
        metrics.BLEU(tokenize=name)
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"the tokenizer {name} needs `pip install 'localglobal_jax[{name[:2]}]'`"
        ) from error
    except Exception as error:  # a download: many kinds of errors
        raise ValueError(
            f"the tokenizer {name} needs a file that sacreBLEU downloads when it is first used, "
            f"which failed ({type(error).__name__}): run it once with a network, or take char"
        ) from error


def signature(*, tokenized: bool = False, tokenize: str = "13a") -> str:
    """Returns sacreBLEU's signature, which belongs beside every published number."""
    return _scores(["a"], ["a"], tokenized, tokenize, quiet=True)["signature"]


def _scores(
    hypotheses: Sequence[str],
    references: Sequence[str],
    tokenized: bool,
    tokenize: str,
    quiet: bool = False,
) -> dict[str, Any]:
    options: dict[str, Any] = {"tokenize": tokenize}
    if tokenized:
        options = {"tokenize": "none", "smooth_method": "none"}
    # force: do not warn that the text looks tokenised
    bleu, chrf = metrics.BLEU(**options, force=tokenized or quiet), metrics.CHRF()
    found = bleu.corpus_score(hypotheses, [references])
    return {
        "bleu": found.score,
        "precisions": list(found.precisions),
        "brevity_penalty": found.bp,
        "hypothesis_tokens": found.sys_len,
        "reference_tokens": found.ref_len,
        "signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "chrf_signature": str(chrf.get_signature()),
    }


def by_length(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    *,
    tokenized: bool = False,
    tokenize: str = "13a",
) -> list[dict[str, Any]]:
    """Computes one corpus score per bucket of source words, shortest first; no empty buckets."""
    counts = words(sources)
    lines = []
    for first, last in BUCKETS:
        chosen = [i for i, n in enumerate(counts) if n >= first and (last is None or n <= last)]
        if chosen:
            found = _scores(
                [hypotheses[i] for i in chosen],
                [references[i] for i in chosen],
                tokenized,
                tokenize,
                quiet=True,
            )
            name = f">{first - 1}" if last is None else f"{max(1, first)}-{last}"
            kept = {"bleu": found["bleu"], "chrf": found["chrf"]}
            lines.append({"words": name, "sentences": len(chosen), **kept})
    return lines


def words(lines: Sequence[str]) -> list[int]:
    """Returns the number of words of each line, separated by blanks.

    In a text without blanks, each character of such a script counts as a word.
    """
    if not tokenizer_of(lines):
        return [len(line.split()) for line in lines]
    scripts = IDEOGRAPHS + SYLLABLES
    return [len(re.findall(rf"[{scripts}]|[^\s{scripts}]+", line)) for line in lines]


def report(result: dict[str, Any]) -> str:
    """Returns the result of `score` as a table of text."""
    precisions = "/".join(f"{p:.1f}" for p in result["precisions"])
    lines = [
        f"BLEU  {result['bleu']:.2f}  {precisions}  (brevity penalty "
        f"{result['brevity_penalty']:.3f}, {result['hypothesis_tokens']:,} tokens for "
        f"{result['reference_tokens']:,})",
        f"      {result['signature']}",
        f"chrF  {result['chrf']:.2f}",
        f"      {result['chrf_signature']}",
    ]
    if "by_length" in result:
        lines.append(f"{'source words':>12}  {'sentences':>9}  {'BLEU':>6}  {'chrF':>6}")
        lines += [
            f"{bucket['words']:>12}  {bucket['sentences']:>9,}  "
            f"{bucket['bleu']:6.2f}  {bucket['chrf']:6.2f}"
            for bucket in result["by_length"]
        ]
    return "\n".join(lines)
