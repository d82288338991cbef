"""Real input, end to end: 2,067 paragraphs of SQuAD through ``ray job submit``, served, 50 questions streamed.

    python examples/squad.py .../squad_dev_v1.1.json.gz

Starts a Ray cluster of its own, submits the precompute job to it as an operator would, starts the service, asks over
HTTP, and checks every answer against the oracle: the same model, one plain forward pass over the whole prompt with
the segment mask, then its own greedy decoding. The embedded model has never seen such text, so the answers are poor;
what must hold is that they are the oracle's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo import ENVIRONMENT, LINKED, ROOT, DemoError, Reply, ask, console, free_port, run, service, step
from rich.progress import track
from transformers import DynamicCache

from kvlink_core.engine import SamplingParams
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.prompt import Prompt
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentRef, Message

RUN = ROOT / "runs" / "squad"
DOCUMENTS_EACH = 5
MAX_TOKENS = 32


def convert(squad: Path, corpus: Path) -> list[dict[str, Any]]:
    """Write the paragraphs as JSON lines; returns questions, each with its paragraph and four of the same article."""
    data = json.loads(gzip.decompress(squad.read_bytes()))["data"]
    questions: list[dict[str, Any]] = []
    with corpus.open("w", encoding="utf-8") as file:
        for number, article in enumerate(data):
            ids = [f"squad-{number}-{i}" for i in range(len(article["paragraphs"]))]
            for i, paragraph in zip(ids, article["paragraphs"], strict=True):
                row = {"id": i, "text": paragraph["context"]}
                file.write(json.dumps(row) + "\n")
            for at, paragraph in enumerate(article["paragraphs"]):
                others = [ids[(at + step) % len(ids)] for step in range(1, DOCUMENTS_EACH)]
                documents = [*others[:2], ids[at], *others[2:]]
                texts = {i: article["paragraphs"][ids.index(i)]["context"] for i in documents}
                if paragraph["qas"]:
                    asked = paragraph["qas"][0]["question"]
                    questions.append({"question": asked, "documents": documents, "texts": texts})
    every = max(1, len(questions) // 50)
    return questions[::every][:50]


def submit(corpus: Path, store: Path) -> None:
    """``ray job submit`` on a cluster of our own, which is ended again."""
    port, dashboard = free_port(), free_port()
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
         "--include-dashboard=true", f"--temp-dir=/tmp/ray-squad-{os.getpid()}"],
        env=ENVIRONMENT | {"RAY_ADDRESS": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=ROOT, stdout=(RUN / "ray.log").open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, head)
        run([
            sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--working-dir", ".",
            "--", "python", "pipeline/precompute.py", "--input", str(corpus), "--store", str(store),
            "--model", "embedded", "--chunk-tokens", "4096", "--summary-json", str(RUN / "precompute.json"),
        ])  # fmt: skip
    finally:
        head.terminate()
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, 9)  # the session that was started above, and nothing else
            head.wait(10)


def wait_for(address: str, head: subprocess.Popen[bytes]) -> None:
    """Return when the dashboard takes jobs."""
    import httpx

    for _ in range(240):
        if head.poll() is not None:
            raise DemoError(f"ray start ended with exit code {head.returncode}; see runs/squad/ray.log.")
        try:
            if httpx.get(f"{address}/api/jobs/", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    raise DemoError("the Ray dashboard did not come up; see runs/squad/ray.log.")


def isolation_mask(prompt: Prompt) -> torch.Tensor:
    """The mask of the oracle, additive float32 ``[1, 1, length, length]``: causal, documents see only themselves."""
    length = prompt.length
    owner = torch.full((length,), -1)
    for segment in prompt.documents:
        owner[segment.start : segment.end] = segment.document
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    free = (owner < 0)[:, None]
    seen = causal & (free | (owner[:, None] == owner[None, :]))
    return torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@torch.inference_mode()
def oracle(model: LoadedModel, question: dict[str, Any]) -> list[int]:
    """The oracle's greedy tokens."""
    layout, network = model.layout, model.network
    documents = [layout.document_tokens(Document(i, question["texts"][i])) for i in question["documents"]]
    prompt = layout.build([Message("user", question["question"])], documents, links=layout.link_tokens)
    cache = DynamicCache()
    logits = network(
        input_ids=prompt.token_ids()[None], attention_mask=isolation_mask(prompt), past_key_values=cache,
        position_ids=torch.arange(prompt.length)[None], use_cache=True, logits_to_keep=1,
    ).logits[0, -1]  # fmt: skip
    tokens: list[int] = []
    while (token := int(logits.argmax())) not in model.stop_ids:
        tokens.append(token)
        if len(tokens) == MAX_TOKENS:
            break
        position = torch.tensor([[prompt.length + len(tokens) - 1]])
        logits = network(
            input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=position, use_cache=True
        ).logits[0, -1]
    return tokens


def linked_tokens(session: Session, question: dict[str, Any]) -> list[int]:
    """The product's greedy tokens, from the same store, in this process."""
    request = AnswerRequest(
        [Message("user", question["question"])],
        [DocumentRef(i) for i in question["documents"]],
        LINKED,
        SamplingParams(max_tokens=MAX_TOKENS),
    )
    return [token for event in session.start(request) for token in event.token_ids]


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("squad", type=Path, help="squad_dev_v1.1.json.gz, in SQuAD's official nesting")
    squad = parser.parse_args().squad
    RUN.mkdir(parents=True, exist_ok=True)
    corpus, store = RUN / "corpus.jsonl", RUN / "store"
    questions = convert(squad, corpus)
    try:
        step("1. Precompute through `ray job submit`")
        submit(corpus, store)
        step(f"2. Serve, and stream {len(questions)} answers over HTTP, {DOCUMENTS_EACH} documents each")
        served: list[dict[str, Any]] = []
        with service(store, RUN) as client:
            for question in track(questions, "asking", console=console):
                ask(client, question, LINKED, MAX_TOKENS)  # not counted: brings the shard's pages into memory
                both: dict[str, list[Reply]] = {"full": [], LINKED: []}
                for _ in range(3):
                    for linker, replies in both.items():
                        replies.append(ask(client, question, linker, MAX_TOKENS))
                reply = both[LINKED][0]
                medians = {name: statistics.median(r.first_ms for r in replies) for name, replies in both.items()}
                served.append({"text": reply.text, "tokens": reply.completion, "cached": reply.cached, **medians})
        step("3. Compare with the oracle")
        model = load_model()
        session = Session(model, DocumentStore.open(str(store), fingerprint=model.fingerprint))
        same_tokens = same_text = 0
        for question, answer in zip(track(questions, "oracle", console=console), served, strict=True):
            expected = oracle(model, question)
            same_tokens += linked_tokens(session, question) == expected
            same_text += (answer["text"], answer["tokens"]) == (model.layout.decode(expected), len(expected))
    except DemoError as error:
        console.print(f"\n[red]failed:[/red] {error}")
        return 1
    ratios = [s[LINKED] / s["full"] for s in served]
    cached = [s["cached"] for s in served]
    console.print(
        f"\n{same_text} of {len(served)} answers over HTTP equal the oracle's text and number of tokens; in process, "
        f"{same_tokens} of {len(served)} equal its greedy tokens one by one.\n"
        f"cached tokens per prompt: median {statistics.median(cached):.0f}, largest {max(cached)}.\n"
        f"time to first token over HTTP, medians: full {statistics.median(s['full'] for s in served):.1f} ms, "
        f"linked {statistics.median(s[LINKED] for s in served):.1f} ms; ratio per question: median "
        f"{statistics.median(ratios):.3f}, worst {max(ratios):.3f}."
    )
    result = {"same_text": same_text, "same_tokens": same_tokens, "served": served}
    (RUN / "result.json").write_text(json.dumps(result, indent=1))
    return 0 if same_text == same_tokens == len(served) else 1


if __name__ == "__main__":
    sys.exit(main())
