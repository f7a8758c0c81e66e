"""Put the machine card of the other benchmarks into pytest-benchmark's results."""

from typing import Any

import harness

from unpadded.cli.benchmark import machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["card"] = machine.card(harness.ROOT)
