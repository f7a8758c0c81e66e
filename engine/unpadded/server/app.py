"""The ASGI application: one route per endpoint, the OpenAPI document, and CORS if configured."""

from typing import Any

import msgspec
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import unpadded
from unpadded.server.api import cohere, nomic, openai, tei
from unpadded.server.endpoint import Endpoint, EndpointApp, ServerState
from unpadded.server.errors import HTTPError, api_of_path
from unpadded.server.responses import JSON, html_page

ENDPOINTS: list[Endpoint] = [endpoint for api in (openai, nomic, cohere, tei) for endpoint in api.ENDPOINTS]


def make_app(state: ServerState) -> Starlette:
    """Return the application with the endpoints of every API."""
    routes = [Route(endpoint.path, EndpointApp(endpoint, state), methods=[endpoint.method]) for endpoint in ENDPOINTS]
    routes += [
        Route("/openapi.json", Response(orjson.dumps(openapi()), media_type=JSON), methods=["GET"]),
        Route("/docs", HTMLResponse(html_page("docs.html")), methods=["GET"]),
    ]
    origins = state.service.options.cors_origin
    allowed: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["*"]}
    cors = [Middleware(CORSMiddleware, allow_origins=origins, **allowed)] if origins else []
    return Starlette(routes=routes, middleware=cors, exception_handlers={HTTPException: _routing_error})


async def _routing_error(request: Request, exception: Exception) -> Response:
    assert isinstance(exception, HTTPException), exception
    path = request.url.path
    kind = "method_not_allowed" if exception.status_code == 405 else "not_found"
    error = HTTPError(kind, f"there is no endpoint {request.method} {path}; see /openapi.json")
    status, body = error.encode(api_of_path(path))
    return Response(body, status, exception.headers, JSON)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of all endpoints."""
    request_types = [endpoint.request_type for endpoint in ENDPOINTS if endpoint.request_type is not None]
    _, schemas = msgspec.json.schema_components(request_types, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace(":path}", "}")
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "tags": [endpoint.api],
            "operationId": f"{endpoint.method.lower()}{path.translate(str.maketrans('/{}', '___'))}",
            "responses": {"200": {"description": "success"}, "default": {"description": "an error"}},
        }
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if endpoint.request_type is not None:
            schema = {"$ref": f"#/components/schemas/{endpoint.request_type.__name__}"}
            operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    info = {"title": "unpadded", "version": unpadded.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
