"""The server: one engine behind OpenAI's, nomic's and text-embeddings-inference's interfaces, on one port.

options      flags, and what they say
lifecycle    load, warm up, listen, drain
app          routes to endpoints
endpoint     one exchange: limits, request in, work, response out, errors, log line
service      the engine as endpoints use it: models by name, shared batches
traces       a span a request, where a collector was named
openai, tei, nomic   an interface each: its requests, its responses
"""
