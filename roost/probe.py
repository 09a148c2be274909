"""Health probe for containers: `python -m roost.probe URL` exits 0 when URL answers 200.

Only the standard library, and no shell or curl in the image.
"""

from __future__ import annotations

import sys
import urllib.request


def main() -> int:
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=4) as answer:  # noqa: S310 - our own URL
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
