"""Passes that are recorded and replayed: padding and whole buffers against the oracle; real graphs on CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles import greedy, greedy_blended
from strategies import DOCUMENTS, difference, follow, linked_by, prompt_for
from tiny import save_tiny, tiny_configs

from kvlink_core.linking import LinkedCache
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.models.graphs import TOKENS, Graphs, buffer_size
from kvlink_core.models.split_attention import HIDDEN, split_attention, split_parts

STEPS = 5


class Again:
    """A recording for any device: runs the pass anew on whatever its inputs hold by then."""

    made = 0

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, pool: object) -> None:
        type(self).made += 1
        self.inputs = inputs
        self._forward = forward
        self.logits = torch.empty(0)

    def replay(self) -> None:
        self.logits = self._forward(self.inputs)


class Wrong(Again):
    """One that gives something else, and leaves something else behind."""

    def replay(self) -> None:
        self.inputs[0] += 1
        super().replay()


class Impossible(Again):
    def __init__(self, *args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")


def with_graphs(model: LoadedModel, record: type[Again], idle_bytes: int = 2**30) -> LoadedModel:
    graphs = Graphs(model.device, model.dtype, model.recipes.shapes, record=record, idle_bytes=idle_bytes)
    return replace(model, lm=replace(model.lm, graphs=graphs))


@pytest.fixture(
    scope="module", params=["llama", "llama-yarn", "mistral-window", "gemma2", "qwen3-window", "deepseek_v3"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny(tmp_path_factory.mktemp(request.param), tiny_configs()[request.param])))


def expected(model: LoadedModel, spec: str) -> tuple[list[int], list[torch.Tensor]]:
    return greedy(model.network, prompt_for(model, spec), STEPS, isolate=True)


@pytest.mark.parametrize("spec", ["link-tokens", "reposition"])
def test_replayed_passes_follow_the_oracle(model: LoadedModel, spec: str) -> None:
    graphed = with_graphs(model, Again)
    truth, before = expected(model, spec), Again.made
    computed = len(linked_by(model, spec, prompt_for(model, spec)).pending)
    for _ in range(3):  # as it is, recorded, replayed
        follow(linked_by(graphed, spec, prompt_for(graphed, spec), reserve=STEPS), truth)
    assert graphed.lm.graphs is not None
    assert graphed.lm.graphs.usable
    # One for single tokens, and one for the prompt's where these are more than are computed with a single one.
    assert Again.made == before + 1 + (computed > TOKENS[0])


def test_what_earlier_prompts_left_does_not_show(tiny_model: LoadedModel) -> None:
    graphed = with_graphs(tiny_model, Again)
    prompt = prompt_for(graphed, "link-tokens")
    for poison in (float("nan"), float("inf"), 1e30):
        linked = linked_by(graphed, "link-tokens", prompt, reserve=STEPS)
        linked.keys[:, :, prompt.length :] = poison
        linked.values[:, :, prompt.length :] = poison
        del linked
        gc.collect()
        follow(linked_by(graphed, "link-tokens", prompt, reserve=STEPS), expected(tiny_model, "link-tokens"))


def test_a_pass_with_as_many_tokens_as_a_recording_has_needs_no_padding(tiny_model: LoadedModel) -> None:
    graphed = with_graphs(tiny_model, Again)
    # Of epic, first tokens are computed anew: their places lie before those of tokens that were placed.
    spec = next(s for k in range(1, 9) if len(linked_by(graphed, s := f"epic:k={k}", prompt_for(graphed, s)).pending)
                in TOKENS)  # fmt: skip
    prompt = prompt_for(graphed, spec)
    k = int(spec.rpartition("=")[2])
    fresh = {slot for s in prompt.documents for slot in range(s.start, min(s.end, s.start + k))}
    alone = {slot for s in prompt.documents for slot in range(s.start, s.end)} - fresh
    truth = greedy_blended(tiny_model.network, prompt, STEPS, stale=lambda layer: alone)
    for _ in range(3):
        follow(linked_by(graphed, spec, prompt, reserve=STEPS), truth)


@pytest.mark.parametrize("record", [Wrong, Impossible])
def test_what_cannot_be_replayed_runs_without(tiny_model: LoadedModel, record: type[Again]) -> None:
    graphed = with_graphs(tiny_model, record)
    assert graphed.lm.graphs is not None
    for _ in range(3):
        prompt = prompt_for(graphed, "link-tokens")
        follow(linked_by(graphed, "link-tokens", prompt, reserve=STEPS), expected(tiny_model, "link-tokens"))
    assert not graphed.lm.graphs.usable


def test_two_prompts_at_a_time_have_a_buffer_each(tiny_model: LoadedModel) -> None:
    graphed = with_graphs(tiny_model, Again)
    prompt = prompt_for(graphed, "link-tokens")
    truth = expected(tiny_model, "link-tokens")
    linked = [linked_by(graphed, "link-tokens", prompt, reserve=STEPS) for _ in range(2)]
    assert linked[0].keys.data_ptr() != linked[1].keys.data_ptr()
    for step in range(STEPS):
        for one in linked:
            at = (one.token_ids[one.pending], one.pending)
            if step:
                at = (torch.tensor(truth[0][step - 1 : step]), torch.tensor([prompt.length + step - 1]))
            assert difference(one.compute(*at), truth[1][step]) <= 1e-5


@pytest.mark.parametrize("graphs", [False, True])
def test_memory_that_inference_mode_made_is_used_outside_of_it(tiny_model: LoadedModel, graphs: bool) -> None:
    model = with_graphs(tiny_model, Again) if graphs else tiny_model
    prompt = prompt_for(model, "link-tokens")
    with torch.inference_mode():
        made = linked_by(model, "link-tokens", prompt, reserve=STEPS)
        del made
    gc.collect()
    follow(linked_by(model, "link-tokens", prompt, reserve=STEPS), expected(tiny_model, "link-tokens"))


def test_buffers_come_back_and_no_more_are_kept_than_asked(tiny_model: LoadedModel) -> None:
    def addresses(graphed: LoadedModel) -> set[int]:
        seen = set()
        for _ in range(3):
            linked = LinkedCache(graphed, prompt_for(graphed, "reposition"), reserve=4)
            seen.add(linked.keys.data_ptr())
            del linked
            gc.collect()
        return seen

    graphed = with_graphs(tiny_model, Again)
    assert len(addresses(graphed)) == 1
    graphed = with_graphs(tiny_model, Again, idle_bytes=0)
    addresses(graphed)
    assert graphed.lm.graphs is not None
    assert graphed.lm.graphs._idle == []


@pytest.mark.parametrize("slots", [1, 511, 512, 513, 4096, 4097, 5133, 32_001, 131_072])
def test_buffers_are_of_few_sizes_and_hardly_too_large(slots: int) -> None:
    size = buffer_size(slots)
    assert slots <= size <= max(slots + 512, slots * 1.125 + 1)
    assert buffer_size(size) == size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "llama-yarn"])
def test_on_a_gpu_graphs_are_replayed_and_follow_the_oracle(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = str(save_tiny(tmp_path_factory.mktemp(name), tiny_configs()[name]))
    truth = expected(load_model(directory), "link-tokens")
    model = load_model(directory, device="cuda", dtype="float32")
    assert model.lm.graphs is not None
    for _ in range(3):
        linked = linked_by(model, "link-tokens", prompt_for(model, "link-tokens", DOCUMENTS), reserve=STEPS)
        token_ids, positions = linked.token_ids[linked.pending], linked.pending
        for step, (token, logits) in enumerate(zip(*truth, strict=True)):
            assert difference(linked.compute(token_ids, positions).cpu(), logits) <= 1e-4  # TF32 is off
            token_ids, positions = torch.tensor([token]), torch.tensor([linked.prompt.length + step])
        del linked  # so that the next prompt has the same buffer
        gc.collect()
    assert model.lm.graphs.usable
    (buffer,) = model.lm.graphs._idle
    assert len(buffer.recorded) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "queries", "slots"), [(8, 328, 5632), (2, 24, 512), (1, 70, 34_816)])
def test_attention_in_parts_is_attention(heads: int, queries: int, slots: int, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, heads, n, 64, device="cuda", dtype=dtype) for n in (queries, slots, slots))
    seen = torch.arange(slots, device="cuda") <= torch.randint(0, slots, (queries, 1), device="cuda")
    mask = torch.zeros(queries, slots, device="cuda", dtype=dtype).masked_fill_(~seen, HIDDEN[dtype])[None, None]
    scores = (query.double() @ key.double().transpose(-1, -2) / 8).masked_fill(~seen, -torch.inf)
    parts = split_parts(query, key, value)
    assert parts > 1
    off = difference(split_attention(query, key, value, mask, parts, None), scores.softmax(-1) @ value.double())
    assert off <= {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
