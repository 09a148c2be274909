"""`python -m services.placer`: one placer, configured by the environment."""

from __future__ import annotations

from services.placer.app import run
from services.placer.config import PlacerConfig
from shared.config import load_or_exit
from shared.logs import configure
from shared.supervise import run_service


def main() -> None:
    config = load_or_exit(PlacerConfig, "PLACER")
    configure("placer", config.log_format, config.log_level)
    run_service(lambda stop: run(config, stop), "placer")


if __name__ == "__main__":
    main()
