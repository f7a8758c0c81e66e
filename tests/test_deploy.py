"""The Dockerfile and the Kubernetes example name flags, files, paths and times that are real."""

from __future__ import annotations

import argparse
import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from unpadded.cli import serve
from unpadded.server.app import ENDPOINTS
from unpadded.server.options import KEYS_VARIABLE, ServerOptions, read_options

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "docs/kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def instruction(name: str) -> str:
    """The arguments of the first instruction of this name."""
    return next(line.removeprefix(name).strip() for line in LINES if line.startswith(name))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """What the command line makes of the image's entrypoint and the arguments of a container."""
    program, *words = json.loads(instruction("ENTRYPOINT"))
    assert program == "unpadded"
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    return parser.parse_args([*words, *arguments])


def test_the_image_copies_and_installs_what_there_is() -> None:
    copied = [word for line in LINES if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert path.split("/")[0] in copied
    (extras,) = re.findall(r'pip install "\.\[([\w,]+)\]"', "\n".join(LINES))
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()


def test_the_examples_of_the_image_parse() -> None:
    examples = [line.split(" unpadded:")[1].split() for line in LINES if line.startswith("#   docker run -p 8080:8080")]
    stages = [line.split()[-1] for line in LINES if line.startswith("FROM")]
    assert [stage for stage, *_ in examples] == ["cpu", "cuda"] and {"cpu", "cuda"} < set(stages)
    for _, *arguments in examples:
        options = read_options(parsed(arguments))
        assert (options.host, str(options.port)) == ("0.0.0.0", instruction("EXPOSE"))
    assert instruction("USER") == str(POD["spec"]["securityContext"]["runAsUser"]) != "0"


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_follows_the_status(status: int, healthy: bool) -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        _, *command = json.loads(instruction("HEALTHCHECK").split("CMD ")[1])
        address = f":{instruction('EXPOSE')}/"
        assert address in command[-1]
        command[-1] = command[-1].replace(address, f":{server.server_port}/")
        assert (subprocess.run([sys.executable, *command], capture_output=True).returncode == 0) == healthy
        thread.join()


def test_the_flags_of_the_deployment_parse() -> None:
    args = parsed(CONTAINER["args"])
    options = read_options(args)
    assert args.model == "nomic-ai/nomic-embed-text-v1.5" and options.default_task == "search_document"
    stop = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert stop + options.grace < POD["spec"]["terminationGracePeriodSeconds"]
    assert CONTAINER["env"][0]["name"] == KEYS_VARIABLE


def test_probes_ask_for_paths_that_are_open_on_the_port_of_the_server() -> None:
    opened = {endpoint.path for endpoint in ENDPOINTS if endpoint.open}
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["path"] for probe in probes.values()} <= opened
    assert POD["metadata"]["annotations"]["prometheus.io/path"] in opened
    (port,) = CONTAINER["ports"]
    assert {probe["port"] for probe in probes.values()} == {port["name"], SERVICE["spec"]["ports"][0]["targetPort"]}
    assert port["containerPort"] == ServerOptions().port == int(POD["metadata"]["annotations"]["prometheus.io/port"])


def test_the_parts_of_the_example_fit_together() -> None:
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == SERVICE["spec"]["selector"]
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["spec"]["volumes"]}
    writes = re.findall(r"(?:HF_HOME|TRITON_CACHE_DIR)=(\S+)", "\n".join(LINES))
    assert len(writes) == 2 and all(path.startswith(mounts["models"]) for path in writes)
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
