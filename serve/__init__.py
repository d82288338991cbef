"""The service: a Ray Serve application that answers over HTTP from stored document caches.

``serve.app`` builds it, ``serve.config`` says what can be set, ``serve.ingress`` is the FastAPI application behind
``serve.guard``, ``serve.server`` the replica that holds the model, ``serve.documents`` what adds and lists documents,
and ``serve.wire`` what travels between these. README.md lists the rest.
"""
