"""`python -m services.gateway`: one gateway, configured by the environment."""

from __future__ import annotations

from services.gateway.app import run
from services.gateway.config import GatewayConfig
from shared.config import load_or_exit
from shared.logs import configure
from shared.supervise import run_service


def main() -> None:
    config = load_or_exit(GatewayConfig, "GATEWAY")
    configure("gateway", config.log_format, config.log_level)
    run_service(lambda stop: run(config, stop), "gateway")


if __name__ == "__main__":
    main()
