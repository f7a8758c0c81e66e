"""pytest-benchmark's results carry the same card as every other bench's."""

from typing import Any

import machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["card"] = machine.card()
