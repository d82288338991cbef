"""What the tests of the service share."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Ray Serve 2.60 defines its own schemas with keywords that pydantic has deprecated.
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401
