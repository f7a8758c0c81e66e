"""The ASGI application: a route an endpoint, its OpenAPI document, CORS where asked."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response as StarletteResponse
from starlette.routing import Route

import unpadded
from unpadded.server.api import nomic, openai, tei
from unpadded.server.endpoint import Application, Endpoint, State
from unpadded.server.errors import Interface, Problem, body, status
from unpadded.server.responses import JSON

ENDPOINTS: list[Endpoint] = [*openai.ENDPOINTS, *nomic.ENDPOINTS, *tei.ENDPOINTS]
KINDS = {404: "not_found", 405: "method_not_allowed"}


def make_app(state: State) -> Starlette:
    """Every interface over one State."""
    routes = [Route(endpoint.path, Application(endpoint, state), methods=[endpoint.method]) for endpoint in ENDPOINTS]
    document = orjson.dumps(openapi())

    async def describe(request: Request) -> StarletteResponse:
        return StarletteResponse(document, media_type=JSON)

    origins = list(state.service.options.cors_origin)
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=[*routes, Route("/openapi.json", describe)],
        middleware=[cors] if origins else [],
        exception_handlers={HTTPException: _no_route},
    )


async def _no_route(request: Request, error: Exception) -> StarletteResponse:
    assert isinstance(error, HTTPException), error
    path, kind = request.url.path, KINDS.get(error.status_code, "invalid")
    interface: Interface = "openai" if path.startswith("/v1/") else "tei"
    problem = Problem(kind, f"nothing answers {request.method} {path}; /openapi.json lists what does")
    content = orjson.dumps(body(problem, interface))
    return StarletteResponse(content, status(problem, interface), error.headers, JSON)


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of all endpoints."""
    requests = [endpoint.request for endpoint in ENDPOINTS if endpoint.request is not None]
    _, components = msgspec.json.schema_components(requests, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace(":path}", "}")
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "tags": [endpoint.interface],
            "operationId": f"{endpoint.method.lower()}{path.translate(str.maketrans('/{}', '___'))}",
            "responses": {"200": {"description": "the answer"}, "default": {"description": "an error"}},
        }
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if endpoint.request is not None:
            schema = {"$ref": f"#/components/schemas/{endpoint.request.__name__}"}
            operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    info = {"title": "unpadded", "version": unpadded.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}
