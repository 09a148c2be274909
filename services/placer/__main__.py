"""`python -m services.placer`: one placer, configured by the environment."""

from __future__ import annotations

import gc

from services.placer.app import run
from services.placer.config import PlacerConfig
from shared.config import load_or_exit
from shared.logs import configure
from shared.supervise import run_service


def main() -> None:
    config = load_or_exit(PlacerConfig, "PLACER")
    configure("placer", config.log_format, config.log_level)
    # What is there now stays: modules, half of all that a collection would look at else, which
    # with 10,000 active models takes 13 ms then and not 20 to 30. The rest of the remedy is that
    # what comes by the thousand (reports, bindings) holds no cycles and is not followed
    # (`gc=False`): a whole collection is rare then, and other thresholds bring no more.
    gc.collect()
    gc.freeze()
    run_service(lambda stop: run(config, stop), "placer")


if __name__ == "__main__":
    main()
