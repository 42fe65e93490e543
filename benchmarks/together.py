"""`python -m benchmarks.together 560 -- ops --dtype float32 -- encoder --texts 96`: suites that take turns, round by
round, for so many seconds at most."""

from __future__ import annotations

import sys
from itertools import groupby

from benchmarks import encoder, ops
from benchmarks.turns import measure

SUITES = {"ops": ops.prepare, "encoder": encoder.prepare}

if __name__ == "__main__":
    told = [list(words) for between, words in groupby(sys.argv[1:], lambda word: word == "--") if not between]
    (total,), *suites = told
    measure([(SUITES[name], options) for name, *options in suites], float(total))
