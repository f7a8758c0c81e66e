"""An HTTP server for engines, with the APIs of OpenAI, nomic, text-embeddings-inference, Jina and Cohere.

options        flags of `unpadded serve` and their validation
serve          start, listen, drain on SIGTERM
app            ASGI application: one route per endpoint, and the OpenAPI document
endpoint       one request from its first byte to its log line; API keys
http_protocol  HTTP/1.1: limits for heads, held and unread bytes; upgrades
request_body   limits of a body's size and time, decompression, JSON to request types, with the fields of other APIs
service        the served models as endpoints use them: names, tasks, limits, shared batches
responses      response bodies, and the pages in pages/
errors         error responses
metrics        Prometheus metrics
api/           fields: what requests share; openai (also Jina), nomic, tei, cohere (also Voyage): types and handlers
"""
