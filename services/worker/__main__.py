"""`python -m services.worker`: one worker, configured by the environment."""

from __future__ import annotations

from services.worker.app import run
from services.worker.config import WorkerConfig
from services.worker.launch import hide_from_engines
from shared.config import load_or_exit
from shared.logs import configure
from shared.supervise import run_service


def main() -> None:
    config = load_or_exit(WorkerConfig, "WORKER")
    configure("worker", config.log_format, config.log_level)
    hide_from_engines()
    run_service(lambda stop: run(config, stop), "worker")


if __name__ == "__main__":
    main()
