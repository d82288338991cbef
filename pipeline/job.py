"""The job itself: scan the corpus, plan against the catalog, encode what is missing, commit as it arrives.

    files -> rows -> chunks with keys            (tasks; kept in Ray's object store, tokens included)
          -> the plan                            (driver; small columns only)
          -> chunks to compute -> actors         (each writes its own shards; only catalog rows come back)
          -> atomic commits                      (driver; every few seconds)

Keys and values never cross Ray's object store. A killed run leaves what was committed, which the next run skips, and
shards that nobody names, which garbage collection removes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from kvlink_core.errors import ConfigError, KVLinkError
from kvlink_core.models.describe import ModelDescription, describe_model
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.template import DocumentTemplate
from kvlink_core.text import first_line
from pipeline.config import PrecomputeConfig
from pipeline.plan import Plan, Planner
from pipeline.reading import Columns
from pipeline.sources import Corpus, find_files
from pipeline.stages import EncoderSettings, ShardEncoder, key_rows, row_from_json
from pipeline.summary import Failure, Summary
from pipeline.tables import read_files, select_rows

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parent.parent
#: Set by Ray in the driver of a submitted job.
_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
#: Rows of one tokenizing task: enough to be worth a task, few enough to spread one big file over all cores.
_KEY_ROWS = 256


def run(config: PrecomputeConfig) -> Summary:
    """Run a job to its end, on the Ray that is there or a local one.

    Returns:
        What was done; failures of single documents are in it, not raised.

    Raises:
        KVLinkError: the job as a whole cannot be done: configuration, model, store, corpus files, duplicate ids.
            All of these but a store that fails later are raised before anything is computed.
    """
    try:
        return _run(config)
    except Exception as error:
        if type(error).__name__ == "ExecutionTimeoutError":  # older Rays, which wait for ever, do not have it
            raise ConfigError(
                f"nothing has moved for {config.no_progress_timeout_s:g} s. Does the cluster have {config.actors} "
                f"times {config.num_gpus:g} GPUs and {config.num_cpus:g} CPUs free, and a CPU for the tasks that "
                "feed them? Ask for less, or wait longer with --no-progress-timeout-s."
            ) from error
        raise


def _run(config: PrecomputeConfig) -> Summary:
    began = time.monotonic()
    config = config.model_copy(update={"store": resolve_store(config.store)})
    corpus = find_files(config.input, config.input_options)
    model = describe_model(config.model, device=config.encoder_device, dtype=config.dtype)
    check_places(config.places, model.layout.template)
    store = DocumentStore.open(
        config.store,
        fingerprint=model.fingerprint,
        namespace=config.namespace,
        create=True,
        codec=config.codec,
        storage_options=config.storage_options or None,
    )
    summary = Summary(
        store=config.store,
        model=config.model,
        fingerprint=model.fingerprint.digest,
        files=len(corpus.files),
        files_ignored=list(corpus.ignored),
    )
    start_ray(config)
    scan = scan_corpus(config, corpus, min(config.chunk_tokens, model.context_length))
    planner = Planner(summary, places=config.places)
    small = [name for name in scan.schema().names if name != "token_ids"]
    for table in scan.select_columns(small).iter_batches(batch_size=4096, batch_format="pyarrow"):
        planner.add(table.to_pylist())
    planner.check(bad_files=config.bad_files, title_column=config.title_column)
    plan = planner.plan(store, codec=store.codec, replace=config.replace)
    committer = Committer(store, summary, plan, config.commit_interval_s, replace=config.replace)
    try:
        if plan.encode:
            for table in encode_chunks(config, model, scan, plan):
                committer.take(table)
    finally:
        # Also after an error or an interrupt: what came back is whole, so a rerun need not compute it again.
        committer.commit()
    summary.wall_s = time.monotonic() - began
    return summary


def check_places(places: int | None, template: DocumentTemplate) -> None:
    """Refuse ``places`` that the model's document template does not name, and a template that needs them.

    Raises:
        ConfigError: one of the two.
    """
    if template.by_place and places is None:
        raise ConfigError(
            "the model's document template names the document's place in the prompt, so that a cache is good for one "
            "place only; --places N stores each document N times, for the first N places.",
            param="places",
        )
    if places is not None and not template.by_place:
        raise ConfigError(
            "--places is for document templates that name the place, and this model's does not: one cache is good for "
            "all places. Leave it out.",
            param="places",
        )


def resolve_store(store: str) -> str:
    """The store's path as every process will understand it.

    Raises:
        ConfigError: a relative path inside a submitted job, whose directory Ray deletes afterwards.
    """
    if "://" in store:
        return store
    if not os.path.isabs(os.path.expanduser(store)) and _JOB_ENV in os.environ:
        raise ConfigError(
            f"the store {store!r} is a relative path, which in a submitted job is inside a directory that Ray "
            "deletes; give an absolute path or a URL that all nodes can write.",
            param="store",
        )
    return os.path.abspath(os.path.expanduser(store))


def start_ray(config: PrecomputeConfig) -> None:
    """Connect to the Ray that is meant: the one in use here, ``ray_address``, ``RAY_ADDRESS`` (a job's), or a new one.

    Also sets what Ray Data must know, for this process.
    """
    if not ray.is_initialized():
        # Not in a submitted job: it brings the packages itself, and this path need not exist on other nodes.
        env = {} if _JOB_ENV in os.environ else {"runtime_env": {"env_vars": {"PYTHONPATH": str(CHECKOUT)}}}
        # Never "whatever runs here": what a dead cluster has left behind would be waited for.
        address = config.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            ray.init(address=address, log_to_driver=True, **env)
        except (ConnectionError, ValueError, RuntimeError) as error:  # what Ray raises for an address
            raise ConfigError(f"cannot connect to Ray at {address!r}: {first_line(error)}") from error
    context = DataContext.get_current()
    # The default is half an hour of silence when actors can never start.
    if "execution_no_progress_timeout_s" in {f.name for f in fields(context)}:
        context.execution_no_progress_timeout_s = config.no_progress_timeout_s
    # Chunks come in the corpus's order, so that a killed run and its rerun make the same shards: no orphans.
    context.execution_options.preserve_order = True


def scan_corpus(config: PrecomputeConfig, corpus: Corpus, limit: int) -> Dataset:
    """Read, chunk, tokenize and key the corpus; the result stays in the object store (4 bytes a token)."""
    columns = Columns(config.text_column, config.id_column, config.title_column)
    files = ray.data.from_items([asdict(f) for f in corpus.files])
    rows = files.map_batches(
        read_files,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"columns": columns, "options": config.input_options},
        # Less than a CPU, because it waits for files; and other than the next step's, because Ray would else fuse
        # the two, and one big file would be tokenized on one core.
        num_cpus=0.5,
    )
    settings = {"model": config.model, "limit": limit, "places": config.places}
    keyed = rows.repartition(target_num_rows_per_block=_KEY_ROWS).map_batches(
        key_rows, batch_size=None, batch_format="pyarrow", fn_kwargs=settings
    )
    return keyed.materialize()


def encode_chunks(config: PrecomputeConfig, model: ModelDescription, scan: Dataset, plan: Plan) -> Iterator[pa.Table]:
    """Encode the planned chunks in actors; yields ``RESULT_SCHEMA`` tables, one for each finished block."""
    shard_tokens = max(1, int(config.shard_mb * 2**20 / model.bytes_per_token))
    mean = plan.tokens / len(plan.encode)
    settings = EncoderSettings(
        model=config.model,
        device=config.encoder_device,
        dtype=config.dtype,
        fingerprint=model.fingerprint.digest,
        store=config.store,
        namespace=config.namespace,
        codec=config.codec,
        storage_options=config.storage_options,
        max_batch_tokens=config.max_batch_tokens,
        shard_tokens=shard_tokens,
        threads=config.threads or _threads(config),
    )
    tickets = np.array(sorted(p.ticket for p in plan.encode.values()), dtype="S16")
    results = (
        scan.map_batches(select_rows, batch_size=None, batch_format="pyarrow", fn_kwargs={"tickets": tickets})
        # Results come back when the task of a whole block ends, so a block is one shard.
        .repartition(target_num_rows_per_block=max(1, round(shard_tokens / mean)))
        .map_batches(
            ShardEncoder,
            fn_constructor_kwargs={"settings": settings},
            batch_size=None,
            batch_format="pyarrow",
            # A whole CPU for each actor can leave none to the tasks that feed it, and then nothing moves.
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus or None,
            compute=ActorPoolStrategy(size=config.actors, max_tasks_in_flight_per_actor=2),
        )
    )
    yield from results.iter_batches(batch_size=None, batch_format="pyarrow")


def _threads(config: PrecomputeConfig) -> int:
    """Torch threads of an actor: the cores of the smallest node with any, shared by all actors.

    Ray would set one, for actors that ask for less than a CPU.
    """
    cores = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    return max(1, min((c for c in cores if c > 0), default=1) // config.actors)


class Committer:
    """Makes shards visible as they come back, in atomic commits a few seconds apart.

    Args:
        store: the driver's store.
        summary: is filled.
        plan: its aliases are committed at once, its followers with the chunk they follow.
        interval_s: least seconds between two commits.
        replace: whether rows also replace rows of the same tokens, whose payload may be damaged.
    """

    def __init__(
        self, store: DocumentStore, summary: Summary, plan: Plan, interval_s: float, *, replace: bool = False
    ) -> None:
        self._store = store
        self._summary = summary
        self._plan = plan
        self._interval_s = interval_s
        self._replace = replace
        self._pending: list[CatalogRow] = list(plan.aliases)
        self._shards: set[str] = set()
        self._span = (float("inf"), 0.0)
        self._last_commit = time.monotonic()
        summary.shared += len(plan.aliases)

    def take(self, table: pa.Table) -> None:
        """Take the results of one block.

        Raises:
            KVLinkError: what an actor says must stop the job; its ``code`` says what kind it is.
        """
        summary = self._summary
        stop: KVLinkError | None = None
        for result in table.to_pylist():
            if result["fatal"]:
                stop = KVLinkError(result["reason"])
                stop.code = result["code"]
                continue
            self._span = (min(self._span[0], result["began"]), max(self._span[1], result["ended"]))
            followers = self._plan.followers.get(result["token_digest"], [])
            piece = self._plan.encode[result["token_digest"]]
            if result["catalog"] is None:
                for chunk_id in (result["chunk_id"], *followers):
                    summary.failed.append(Failure(piece.place, chunk_id, result["code"], result["reason"]))
                continue
            row = row_from_json(result["catalog"])
            self._pending += [row, *(self._store.alias(each, row) for each in followers)]
            self._shards.add(row.shard)
            summary.encoded += 1
            summary.encoded_tokens += row.tokens
            summary.shared += len(followers)
            summary.payload_bytes += row.nbytes
        summary.encode_s = max(0.0, self._span[1] - self._span[0])
        if stop is not None:
            raise stop
        if time.monotonic() - self._last_commit >= self._interval_s:
            self.commit()

    def commit(self) -> None:
        """Commit what is pending, if anything is."""
        if self._pending:
            self._summary.version = self._store.commit(self._pending, replace_payloads=self._replace)
            self._summary.commits += 1
            self._summary.shards = len(self._shards)
            self._pending = []
        self._last_commit = time.monotonic()
