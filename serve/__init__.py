"""The service: a Ray Serve application that answers over HTTP from stored document caches.

``serve.app`` builds it, ``serve.config`` says what can be set, ``serve.protocol`` is the HTTP schema,
``serve.replies`` what is sent back, ``serve.ingress`` the FastAPI application, ``serve.server`` the replica
that holds the model, and ``serve.wire`` what travels between those two.
"""
