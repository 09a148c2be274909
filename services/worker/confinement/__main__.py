"""`python -m services.worker.confinement [JSON]`: what this host would grant an engine, as JSON,
one measure a line; without torch, a device or a model."""

from __future__ import annotations

import os
import sys
import tempfile

import msgspec

from services.worker.confinement.confine import Confined
from services.worker.confinement.plan import Confinement


def main() -> None:
    asked = Confinement(mode="auto")
    if len(sys.argv) > 1:
        asked = msgspec.json.decode(sys.argv[1], type=Confinement)
    with tempfile.TemporaryDirectory() as scratch:
        child = os.fork()  # it is confined, and could not take its folder away
        if not child:
            confined = Confined(msgspec.structs.replace(asked, scratch=scratch), "cpu", 0)
            confined.enter()
            confined.seal()
            lines = b"".join(msgspec.json.encode(each) + b"\n" for each in confined.measures)
            os.write(1, lines)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status)


if __name__ == "__main__":
    main()
