"""The Dockerfile and the Kubernetes example match the project: files, extras, flags, ports, paths and times."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from pathlib import Path

import yaml

from unpadded.cli import serve
from unpadded.cli.serve import read_options
from unpadded.server.app import ENDPOINTS
from unpadded.server.options import API_KEYS_VARIABLE

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "docs/kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def instruction(name: str) -> str:
    """Return the arguments of the only instruction of this name."""
    (arguments,) = re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)
    return arguments


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse arguments that follow the image's entrypoint."""
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    return parser.parse_args([*json.loads(instruction("ENTRYPOINT"))[1:], *arguments])


def test_the_image_copies_existing_files_and_installs_existing_extras() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {"pyproject.toml", *(package.split("/")[0] for package in packages)} < set(copied)
    (extras,) = re.findall(r'pip install "\.\[([\w,]+)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()


def test_the_docker_examples_parse() -> None:
    examples = re.findall(r"^#   docker run .* unpadded:(cpu|cuda) (.+)$", DOCKERFILE, re.MULTILINE)
    assert [device for device, _ in examples] == ["cpu", "cuda"]
    for _, arguments in examples:
        options = read_options(parse(arguments.split()))
        assert (options.host, str(options.port)) == ("0.0.0.0", instruction("EXPOSE"))


def test_the_deployment_passes_valid_flags_and_leaves_time_to_drain() -> None:
    args = parse(CONTAINER["args"])
    options = read_options(args)
    assert args.models == ["nomic-ai/nomic-embed-text-v1.5"] and options.default_task == "search_document"
    before_sigterm = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before_sigterm + options.grace < POD["spec"]["terminationGracePeriodSeconds"]
    assert CONTAINER["env"][0]["name"] == API_KEYS_VARIABLE
    assert POD["spec"]["securityContext"]["runAsUser"] == int(instruction("USER"))


def test_probes_and_metrics_use_public_paths_on_the_server_port() -> None:
    paths = {endpoint.path for endpoint in ENDPOINTS if endpoint.public}
    probes = [CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    annotations = POD["metadata"]["annotations"]
    assert {probe["path"] for probe in probes} | {annotations["prometheus.io/path"]} <= paths
    (port,) = CONTAINER["ports"]
    assert {probe["port"] for probe in probes} == {port["name"], SERVICE["spec"]["ports"][0]["targetPort"]}
    exposed = instruction("EXPOSE")
    assert str(port["containerPort"]) == annotations["prometheus.io/port"] == exposed
    assert f"http://127.0.0.1:{exposed}/health" in DOCKERFILE  # of HEALTHCHECK


def test_caches_are_on_a_mounted_volume() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["spec"]["volumes"]}
    caches = re.findall(r"(?:HF_HOME|TRITON_CACHE_DIR|XDG_CACHE_HOME)=(\S+)", DOCKERFILE)
    assert len(caches) == 3 and all(path.startswith(mounts["models"]) for path in caches)
