"""Health probe for containers: `python -m roost.probe URL` exits 0 when URL answers 200.

Only the standard library, and no shell or curl in the image. Where the service beside it serves
TLS (`ROOST_TLS_CERT_FILE`), so does the probe ask, whatever the URL says, and shows the service's
own certificate where clients need one. It does not verify: it asks the container it is in, by an
address that no certificate is made out to.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request


def main() -> int:
    url = sys.argv[1]
    context = None
    try:
        certificate = os.environ.get("ROOST_TLS_CERT_FILE")
        if certificate:
            url = url.replace("http://", "https://", 1)
        if url.startswith("https:"):
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if context is not None and certificate and os.environ.get("ROOST_TLS_CLIENT_CA_FILE"):
            context.load_cert_chain(certificate, os.environ.get("ROOST_TLS_KEY_FILE") or None)
        with urllib.request.urlopen(url, timeout=4, context=context) as answer:  # noqa: S310 - ours
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
