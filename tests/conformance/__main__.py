"""`python -m tests.conformance --url http://localhost:3000`: exit 0 if the server passes every case it is to pass."""

from __future__ import annotations

import argparse
import sys

from tests.conformance.runner import Target


def main() -> int:
    """Run, print a line for each case, and say how many passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--url", required=True, help="root of the server, such as http://localhost:3000")
    parser.add_argument("--api-key", help="bearer token")
    parser.add_argument("--model", help="which model, where the server has several")
    parser.add_argument("--compat", choices=("openai", "tei"), default="openai", help="dialect of the /v1 errors")
    options = parser.parse_args()
    target = Target(options.url.rstrip("/"), options.api_key, options.model, options.compat)
    kind = target.learn()
    failed = passed = 0
    for case, wrong in target.run(kind):
        failed, passed = failed + (wrong is not None), passed + (wrong is None)
        print(f"{'ok  ' if wrong is None else 'FAIL'} {case.name}" + (f"\n     {wrong}" if wrong else ""))
    print(f"{passed} passed, {failed} failed; model kind {kind}, dialect {options.compat}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
