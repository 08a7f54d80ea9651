# SPDX-License-Identifier: Apache-2.0
"""BLEU and chrF of translations, by sacreBLEU, in total and by length of the source.

BLEU of plain text (the default) is comparable between systems with the same signature. The MUSE
paper reports BLEU of tokenised text: words separated by blanks, no smoothing, as in fairseq.
"""

from collections.abc import Sequence
from typing import Any

from sacrebleu import metrics

# Source words, first and last (arXiv 1911.09483, figures 2 and 7)
BUCKETS = ((0, 15), (16, 30), (31, 45), (46, 60), (61, 75), (76, 90), (91, 105), (106, None))


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    tokenized: bool = False,
) -> dict[str, Any]:
    """Computes BLEU and chrF of translations, one reference each, in percent.

    ``tokenized``: the text is tokenised already, with words separated by blanks. With ``sources``,
    ``by_length`` lists both scores per bucket of source words (separated by blanks); buckets
    without sentences are left out. Raises ValueError if the numbers of lines differ, or are 0.
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
    result = {"sentences": len(hypotheses), **_scores(hypotheses, references, tokenized)}
    if sources is not None:
        result["by_length"] = by_length(hypotheses, references, sources, tokenized=tokenized)
    return result


def _scores(
    hypotheses: Sequence[str], references: Sequence[str], tokenized: bool, quiet: bool = False
) -> dict[str, Any]:
    options: dict[str, Any] = {"tokenize": "none", "smooth_method": "none"} if tokenized else {}
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
) -> list[dict[str, Any]]:
    """Computes one corpus score per bucket of source words, shortest first; no empty buckets."""
    words = [len(source.split()) for source in sources]
    lines = []
    for first, last in BUCKETS:
        chosen = [i for i, n in enumerate(words) if n >= first and (last is None or n <= last)]
        if chosen:
            found = _scores(
                [hypotheses[i] for i in chosen],
                [references[i] for i in chosen],
                tokenized,
                quiet=True,
            )
            name = f">{first - 1}" if last is None else f"{max(1, first)}-{last}"
            kept = {"bleu": found["bleu"], "chrf": found["chrf"]}
            lines.append({"words": name, "sentences": len(chosen), **kept})
    return lines


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
