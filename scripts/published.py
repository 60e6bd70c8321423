"""Published numbers beside ours: `python scripts/published.py NAME=results.json ...` writes docs/published.md."""

import json
import sys
from pathlib import Path

from crosscoder.report.published import CHECKED, published_table

TARGET = Path(__file__).parents[1] / "docs" / "published.md"
HEAD = """# Published numbers beside ours

Written by `python scripts/published.py NAME=results.json ...`: the facts and the rules are those of
`crosscoder/report/published.py`, and each file of results adds a column. A verdict is about the direction of a claim
unless the row says otherwise: the published studies are far larger than ours. "Not comparable" means that ours has the
quantity, but not under the claim's conditions; "not measured" that the file does not hold it.

How far each figure was checked against its source:
"""


def main(arguments: list[str]) -> None:
    """Write the page."""
    named = []
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not path:
            sys.exit(f"{argument!r} is not NAME=results.json, as in smollm2=benchmarks/smollm2-135m/results.json")
        named.append((name, json.loads(Path(path).read_text(encoding="utf-8"))))
    words = [f"- *{name}*: {meaning}" for name, meaning in CHECKED.items()]
    TARGET.write_text("\n".join([HEAD, *words, "", *published_table(named)]) + "\n", encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main(sys.argv[1:])
