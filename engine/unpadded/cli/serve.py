"""`unpadded serve`: serve models over HTTP."""

from __future__ import annotations

import argparse
import time

from unpadded.cli.flags import Commands, add_flags, add_model, add_model_arguments, load
from unpadded.errors import OptionError, install_command
from unpadded.options import describe
from unpadded.server.options import API_KEYS_VARIABLE, FLAG_NAMES, ServerOptions

DESCRIPTION = """\
Serve the embeddings and scores of one or several models over HTTP, with the APIs of OpenAI, nomic,
text-embeddings-inference (TEI), Cohere, Jina and Voyage.
All requests share batches within a token budget, so a short request never waits for a long one to finish."""

EPILOG = """\
APIs:
  OpenAI    POST /v1/embeddings, GET /v1/models        base_url="http://HOST:PORT/v1"
  nomic     POST /v1/embedding/text, GET /v1/user      ATLAS_API_PATH=http://HOST:PORT
  TEI       POST /embed /embed_all /embed_sparse /similarity /rerank /predict /tokenize /decode,
            GET /info /health /metrics
  Cohere    POST /v1/embed /v2/embed /v1/rerank /v2/rerank
  Jina      POST /v1/embeddings /v1/rerank
  Voyage    POST /v1/contextualizedembeddings          base_url="http://HOST:PORT/v1"
  all       GET /openapi.json, and GET / and /docs in a browser. Request bodies may be compressed with gzip. With
            "Accept: application/octet-stream", vectors are returned as raw little-endian float32 rows, and the header
            x-shape has their shape.

status codes of errors:
  400, 413, 422  the request is malformed, too large, or asks for something that the model does not support
  401, 404       the API key is missing or wrong; there is no such model or path
  424            the model failed on these texts; other requests in the same batch are not affected
  429            too many requests or queued tokens; try again after the seconds in Retry-After
  503            the server is draining after SIGTERM, or no device is available
  504            the deadline passed and the work was dropped

several models:
  A request is for the model that its field "model" names. Without one, it is for the first model with scores on routes
  that rank and classify, for the first one with sparse weights on /embed_sparse, and on the others for the first that
  is not a reranker, a classifier or a model like SPLADE. A batch has texts of one model, and the models' batches run in
  turn on one device. --alias, --default-task and the options of loading are for all models; a model that does not have
  the default task ignores it.

several devices:
  --device all, or cuda:0,cuda:1, starts one process per device; they share the queue. If a process exits, it is
  restarted and its batches run on another device: no request is lost. unpadded_devices in /metrics counts the devices
  that accept batches, and /health answers 503 while there are none.

examples:
  unpadded serve nomic-ai/nomic-embed-text-v1.5 --alias text-embedding-3-small --default-task search_document
  unpadded serve BAAI/bge-m3 BAAI/bge-reranker-v2-m3
  unpadded serve ./model --host 0.0.0.0 --port 80 --api-key-file keys.txt --long-input reject
"""

KEYS_DESCRIPTION = f"""\
Sent as "Authorization: Bearer KEY", in UTF-8. Also read from {API_KEYS_VARIABLE}, separated by commas. Without keys,
every request is accepted; an empty key or variable is an error. /health and /metrics never need one."""

LOG_DESCRIPTION = """\
The log on stderr is text on a terminal, otherwise JSON lines; it contains no texts by default.
GET /metrics is for Prometheus."""


def add_command(commands: Commands) -> None:
    """Add the command and its flags."""
    serve = commands.add_parser(
        "serve",
        help="serve one or several models over HTTP",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(command=run)
    add_model(serve, several=True)
    add_flags(serve.add_argument_group("serving", LOG_DESCRIPTION), describe(ServerOptions))
    keys = serve.add_argument_group("API keys", KEYS_DESCRIPTION)
    keys.add_argument("--api-key", action="append", default=[], metavar="KEY", help="accept this key; repeatable")
    keys.add_argument("--api-key-file", metavar="FILE", help="accept the keys in this file, one per line")
    add_model_arguments(serve)


def read_options(args: argparse.Namespace) -> ServerOptions:
    """Return the options that the flags stand for."""
    return ServerOptions.from_mapping({name: getattr(args, name) for name in FLAG_NAMES})


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    started = time.perf_counter()
    try:
        from unpadded.server.logs import configure_logging
        from unpadded.server.serve import logger, reserve, serve
    except ModuleNotFoundError as error:
        raise OptionError(f"serving needs more packages: {error}; {install_command('server')}") from error
    options = read_options(args)
    configure_logging()
    listener = reserve(options)
    engines = []
    for model in args.models:  # in turn: the token budget of each is computed from the memory that the others leave
        logger.info("loading the model", extra={"fields": {"model": model}})
        engines.append(load(args, model))
    serve(engines, options, listener, started)
