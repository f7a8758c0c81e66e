"""Ray Serve: the server's interfaces in front of replicas, each with an engine of its own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import ray.serve
from ray.serve.config import AutoscalingContext
from starlette.applications import Starlette

from unpadded.cli.load_flags import add_model_arguments, load
from unpadded.errors import OptionError
from unpadded.server.app import make_app
from unpadded.server.endpoint import ServerState
from unpadded.server.logs import configure_logging
from unpadded.server.options import ServerOptions, add_flags, read_flags
from unpadded.server.service import Service

# Flags of `unpadded serve` that are Ray's to say: its proxies listen, and read requests.
NOT_HERE = ("host", "port", "tls_cert", "tls_key", "read_timeout")


def serve(args: Mapping[str, Any]) -> ray.serve.Application:
    """The application: `serve run unpadded.integrations.ray:serve model=./model replicas=2`.

    args: `model`, the flags of `unpadded serve` with underscores, and for Ray
    replicas: how many at first and at least (1). max_replicas: as many as the queue asks for, up to so many.
    queued_tokens: that may wait in a replica (262144). While more do, for scale_up_seconds (30), replicas are added;
    while fewer do, for scale_down_seconds (600), they are drained and taken away.
    num_cpus, num_gpus: what a replica holds (1 and 0).
    A list gives a flag several times. Raises OptionError for what `unpadded serve` would refuse.
    """
    found = _read(args)
    if os.path.exists(found.model):
        found.model = os.path.abspath(found.model)  # replicas run in another folder
    options = read_flags(found)
    scaling: dict[str, Any] = {"num_replicas": found.replicas}
    if found.max_replicas is not None:
        if found.max_replicas < found.replicas:
            raise OptionError(f"max_replicas is below replicas: {found.max_replicas} and {found.replicas}; swap them")
        scaling = {
            "autoscaling_config": {
                "min_replicas": found.replicas,
                "max_replicas": found.max_replicas,
                "upscale_delay_s": found.scale_up_seconds,
                "downscale_delay_s": found.scale_down_seconds,
                "policy": {
                    "policy_function": f"{__name__}:QueuedTokens",
                    "policy_kwargs": {"per_replica": found.queued_tokens},
                },
            }
        }
    deployment: Any = ray.serve.deployment(
        name="unpadded",
        **scaling,
        # Above the replica's own limit, so that the one beyond it gets our 429 and does not wait at Ray's proxy.
        max_ongoing_requests=2 * options.max_concurrent_requests,
        graceful_shutdown_timeout_s=options.grace,
        ray_actor_options={"num_cpus": found.num_cpus, "num_gpus": found.num_gpus},
    )
    application: ray.serve.Application = deployment(Replica).bind(found, options)
    return application


@ray.serve.ingress()
class Replica:
    """One engine and its queue."""

    def __init__(self, args: argparse.Namespace, options: ServerOptions) -> None:
        configure_logging()
        self.state = ServerState(Service(load(args), options))
        self.state.service.warm_up()

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(self.state)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What QueuedTokens decides on."""
        return {"queued_tokens": self.state.service.batcher.queued_tokens}


class QueuedTokens:
    """An autoscaling policy: so many replicas that `per_replica` tokens wait in each."""

    def __init__(self, per_replica: int) -> None:
        self._per_replica = per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        queued = (context.aggregated_metrics or {}).get("queued_tokens", {})
        return sum(queued.values()) / self._per_replica, {}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"the application cannot be built: {message}; `unpadded serve --help` says more")


def _read(args: Mapping[str, Any]) -> argparse.Namespace:
    """Arguments as the flags that they are named after, which check them."""
    parser = _Parser("serve run unpadded.integrations.ray:serve", allow_abbrev=False, add_help=False)
    parser.add_argument("--model", required=True)
    add_flags(parser)
    add_model_arguments(parser)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int)
    parser.add_argument("--queued-tokens", type=int, default=262_144)
    parser.add_argument("--scale-up-seconds", type=float, default=30.0)
    parser.add_argument("--scale-down-seconds", type=float, default=600.0)
    parser.add_argument("--num-cpus", type=float, default=1.0)
    parser.add_argument("--num-gpus", type=float, default=0.0)
    flags = []
    for name, value in args.items():
        if name in NOT_HERE:
            raise OptionError(f"{name} is not the application's: {value!r}; set it in the http_options of Ray Serve")
        flag = "--" + name.replace("_", "-")
        if value is True or str(value).lower() == "true":
            flags.append(flag)
        else:
            flags += [f"{flag}={one}" for one in (value if isinstance(value, list | tuple) else [value])]
    return parser.parse_args(flags)
