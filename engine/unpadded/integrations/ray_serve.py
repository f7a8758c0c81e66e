"""Ray Serve: the HTTP server with one engine per replica."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray.serve
from ray.serve.config import AutoscalingContext
from starlette.applications import Starlette

from unpadded.errors import OptionError
from unpadded.loading import load
from unpadded.options import LoadOptions, convert, describe, option
from unpadded.server.app import make_app
from unpadded.server.endpoint import ServerState
from unpadded.server.logs import configure_logging
from unpadded.server.options import FLAG_NAMES, ServerOptions
from unpadded.server.service import Service

# Options of `unpadded serve` that Ray's proxies have instead: they listen, and read the requests.
PROXY_OPTIONS = ("host", "port", "tls_cert", "tls_key", "read_timeout")

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Number and resources of the replicas."""

    replicas: int = option(1, "number of replicas, and their minimum with max_replicas")
    max_replicas: int | None = option(None, "maximum number of replicas; default: a constant number")
    queued_tokens: int = option(262_144, "tokens waiting per replica at which the number stays as it is")
    scale_up_seconds: float = option(30.0, "time for which more tokens wait before replicas are added")
    scale_down_seconds: float = option(
        600.0, "time for which fewer tokens wait before replicas are drained and removed"
    )
    num_cpus: float = option(1.0, "CPUs per replica")
    num_gpus: float = option(0.0, "GPUs per replica")

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise OptionError(
                f"max_replicas is below replicas: {self.max_replicas} and {self.replicas}; pass a larger max_replicas"
            )

    def scaling(self) -> dict[str, Any]:
        """Return the arguments of a deployment for the number of replicas."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        autoscaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "upscale_delay_s": self.scale_up_seconds,
            "downscale_delay_s": self.scale_down_seconds,
            "policy": {
                "policy_function": f"{__name__}:{QueuedTokensPolicy.__name__}",
                "policy_kwargs": {"tokens_per_replica": self.queued_tokens},
            },
        }
        return {"autoscaling_config": autoscaling}


def serve(args: Mapping[str, Any]) -> ray.serve.Application:
    """Return the application, as in `serve run unpadded.integrations.ray:serve model=./model replicas=2`.

    args: `model`, and any of `ReplicaOptions`, `LoadOptions` and `ServerOptions`; strings are converted. OptionError
    for one that is unknown or invalid.
    """
    remaining = dict(args)
    if "model" not in remaining:
        raise OptionError(f"model is missing: {remaining}; pass model=, a folder or a Hugging Face id")
    model = str(remaining.pop("model"))
    if os.path.exists(model):
        model = os.path.abspath(model)  # replicas run in another folder
    replica_options = _take(ReplicaOptions, remaining)
    load_options = _take(LoadOptions, remaining)
    for name, value in remaining.items():
        if name in PROXY_OPTIONS:
            raise OptionError(f"{name} is an option of Ray's proxies: {value!r}; set it in Ray Serve's http_options")
        if name not in FLAG_NAMES:
            raise OptionError(f"option is unknown: {name}={value!r}; see `unpadded serve --help` and ReplicaOptions")
    server_options = ServerOptions.from_mapping(remaining)
    deployment: Any = ray.serve.deployment(
        name="unpadded",
        **replica_options.scaling(),
        # Above the server's own limit, so that requests beyond that get a 429 instead of waiting in Ray's proxy.
        max_ongoing_requests=2 * server_options.max_concurrent_requests,
        graceful_shutdown_timeout_s=server_options.grace,
        ray_actor_options={"num_cpus": replica_options.num_cpus, "num_gpus": replica_options.num_gpus},
    )
    application: ray.serve.Application = deployment(Replica).bind(model, load_options, server_options)
    return application


def _take(options: type[Options], args: dict[str, Any]) -> Options:
    """Remove the options of a class from the arguments and return them."""
    return options(**{one.name: convert(one, args.pop(one.name)) for one in describe(options) if one.name in args})


@ray.serve.ingress()
class Replica:
    """One engine with its queue and its HTTP application."""

    def __init__(self, model: str, load_options: LoadOptions, server_options: ServerOptions) -> None:
        configure_logging()
        self.state = ServerState(Service([load(model, **vars(load_options))], server_options))
        self.state.service.warm_up()

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(self.state)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metrics for `QueuedTokensPolicy`."""
        return {"queued_tokens": self.state.service.batcher.queued_tokens}


class QueuedTokensPolicy:
    """An autoscaling policy: one replica per `tokens_per_replica` queued tokens."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        queued_tokens = (context.aggregated_metrics or {}).get("queued_tokens", {})
        return sum(queued_tokens.values()) / self._tokens_per_replica, {}
