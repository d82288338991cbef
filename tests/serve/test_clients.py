"""The clients that people have, unchanged: OpenAI's own, LangChain's, LlamaIndex's."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from local_service import local_app, served
from running_service import QUESTION, TEXTS, add_document

from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, SamplingParams, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, Message

DOCUMENTS = {"documents": [{"id": "harbour"}]}
PROMPT = "The harbour was built by"


@pytest.fixture(scope="module")
def url(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = tmp_path_factory.mktemp("clients") / "store"
    store = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    add_document(tiny_model, store, "harbour", TEXTS["harbour"])
    store.close()
    with served(local_app(tiny_model, where)) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def answer(tiny_model: LoadedModel) -> str:
    """What the core answers to the question from the document, 8 tokens of it."""
    return ask_core(tiny_model, Message("user", QUESTION[0]["content"]))


def ask_core(model: LoadedModel, *messages: Message) -> str:
    request = AnswerRequest(messages, [Document("", TEXTS["harbour"])], sampling=SamplingParams(max_tokens=8))
    return Session(model).start(request).text()


def test_openai_completions(url: str, tiny_model: LoadedModel) -> None:
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    expected = ask_core(tiny_model, Message("prompt", PROMPT))
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, extra_body=DOCUMENTS)
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=[PROMPT],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=DOCUMENTS,
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=PROMPT, n=2)
    assert refused.value.param == "n"


def test_openai_chat_with_everything_that_works(url: str, answer: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    question: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    whole = client.chat.completions.create(
        model="tiny", messages=question, max_completion_tokens=8, n=1, seed=3, logprobs=True, top_logprobs=2,
        extra_body=DOCUMENTS,
    )  # fmt: skip
    assert whole.choices[0].message.content == answer
    assert whole.choices[0].logprobs is not None
    likely = whole.choices[0].logprobs.content
    assert likely is not None
    assert len(likely) == 8
    # Greedily drawn: each token is the most likely one at its place.
    assert all(each.logprob == each.top_logprobs[0].logprob >= each.top_logprobs[1].logprob for each in likely)
    question = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    stop = client.chat.completions.create(model="tiny", messages=question, max_tokens=8, stop=["\n"])
    assert stop.choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=question, n=2)
    assert refused.value.param == "n"


def test_the_asynchronous_openai_client(url: str, answer: str) -> None:
    async def go() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            question: Any = QUESTION
            stream = await client.chat.completions.create(
                model="tiny", messages=question, max_tokens=8, stream=True, extra_body=DOCUMENTS
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    assert asyncio.run(go()) == answer


def test_langchain_chat(url: str, answer: str) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=url, api_key="unused", max_tokens=8, extra_body=DOCUMENTS, max_retries=0)
    question = [HumanMessage(QUESTION[0]["content"])]
    whole = chat.invoke(question)
    assert whole.content == answer
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["input_token_details"]["cache_read"] > 0
    pieces = list(chat.stream(question, stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == answer
    assert sum(p.usage_metadata["output_tokens"] for p in pieces if p.usage_metadata) == 8
    assert chat.batch([question, question])[1].content == answer
    assert chat.invoke([SystemMessage("Be brief."), *question]).content
    turns = [*question, whole, HumanMessage("And then?")]
    assert chat.invoke(turns).content is not None
    assert chat.bind(logprobs=True).invoke(question).content == answer


def test_langchain_completions(url: str, tiny_model: LoadedModel) -> None:
    from langchain_openai import OpenAI

    model = OpenAI(
        model="tiny", base_url=url, api_key="unused", max_tokens=8, temperature=0, extra_body=DOCUMENTS, max_retries=0
    )
    expected = ask_core(tiny_model, Message("prompt", PROMPT))
    assert model.invoke(PROMPT) == expected
    assert "".join(model.stream(PROMPT)) == expected


@pytest.mark.parametrize("chat", [True, False])
def test_llama_index(url: str, answer: str, tiny_model: LoadedModel, chat: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import uses what Pydantic has deprecated
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model="tiny",
        api_base=url,
        api_key="unused",
        is_chat_model=chat,
        max_tokens=8,
        temperature=0.0,
        max_retries=0,
        additional_kwargs={"extra_body": DOCUMENTS},
    )
    if chat:
        question = [ChatMessage(role="user", content=QUESTION[0]["content"])]
        assert model.chat(question).message.content == answer
        assert "".join(piece.delta or "" for piece in model.stream_chat(question)) == answer
    else:
        expected = ask_core(tiny_model, Message("prompt", PROMPT))
        assert model.complete(PROMPT).text == expected
        assert "".join(piece.delta or "" for piece in model.stream_complete(PROMPT)) == expected
