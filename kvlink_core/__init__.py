"""KVLink: compute each document's key/value cache once, store it, link it into any prompt (arXiv 2502.16002).

Importing this package imports nothing heavy; take what is needed from its modules:
``kvlink_core.models`` (load a model), ``kvlink_core.encode`` (documents to caches), ``kvlink_core.store``
(keep them), ``kvlink_core.linking`` (put them into a prompt), ``kvlink_core.engine`` (generate).
"""

__version__ = "0.1.0"
