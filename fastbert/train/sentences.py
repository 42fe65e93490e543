"""A sentence splitter for European prose, by punctuation. No model, and no claim beyond pretraining data."""

from __future__ import annotations

import re

# Words whose full stop does not end a sentence, in lower case without it.
_WORDS = """
mr mrs ms dr prof rev hon st sr jr messrs mme mlle gen col capt lieut lt sgt maj gov sen rep pres vs etc al cf viz ibid
fig figs eq sec ch vol nos pp ed eds e.g i.e a.m p.m u.s u.k inc ltd co corp jan feb mar apr jun jul aug sep sept oct
nov dec ca approx dept univ assn bros
"""
ABBREVIATIONS = frozenset(_WORDS.split())

# A mark that ends sentences, quotes and brackets that close after it, white space, and what may open the next one.
_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]\u00bb*_]*\s+(?=[\"'\u201c\u2018(\[\u00ab*_]*[^\W_a-z])")
_LAST_WORD = re.compile(r"[\w.]+$")


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, without white space around them; what is between is lost, nothing else.

    A sentence ends at `.`, `!`, `?` or an ellipsis, with the quotes and brackets that close behind it, where white
    space and then an upper-case letter or a digit (perhaps behind an opening quote) follow. It does not end behind a
    single letter ("J. Austen") nor behind one of `ABBREVIATIONS` ("Mr. Darcy", "e.g. This").
    """
    sentences, start = [], 0
    for match in _END.finditer(paragraph):
        if match[0].startswith(".") and not match[0].startswith("..") and _is_abbreviation(paragraph, match.start()):
            continue
        sentences.append(paragraph[start : match.end()].strip())
        start = match.end()
    sentences.append(paragraph[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _is_abbreviation(paragraph: str, stop: int) -> bool:
    word = _LAST_WORD.search(paragraph, max(0, stop - 20), stop)
    if word is None:
        return False
    text = word[0].lower()
    return (len(text) == 1 and text.isalpha() and word[0] != "I") or text in ABBREVIATIONS
