"""An HTTP server for one engine, with the APIs of OpenAI, nomic and text-embeddings-inference on one port.

options        flags of `unpadded serve` and their validation
serve          start, listen, drain on SIGTERM
app            ASGI application: one route per endpoint, and the OpenAPI document
endpoint       one request from its first byte to its log line
request_body   API keys, body size and time limits, decompression
service        the engine as endpoints use it: model names, limits, shared batches
responses      response bodies
errors         error responses
metrics        Prometheus metrics
api/           openai, nomic, tei: the request types and handlers of each API
"""
