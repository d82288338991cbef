"""Chat templates in the manner of real families, each of another structure, and a tokenizer that knows their tokens."""

from __future__ import annotations

from tiny import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import DocumentTemplate
from kvlink_core.types import Document, Message

TOKENS = ("<|open|>", "<|shut|>", "<|turn|>", "[INST]", "[/INST]", "<s>", "</s>")

#: Each turn under a header that names its role; contents are trimmed.
HEADERS = (
    "<s>{% for m in messages %}{{ '<|open|>' + m['role'] + '<|shut|>\n\n' + m['content'] | trim + '<|turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant<|shut|>\n\n' }}{% endif %}"
)

#: ChatML, with a system text of its own where none is given.
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|open|>system\nBe helpful.<|shut|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|open|>' ~ m.role ~ '\n' ~ m.content ~ '<|shut|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
)

#: Roles must alternate; the system text goes into the first user turn; nothing marks where the answer begins.
INSTRUCTIONS = """\
{%- set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if first else messages -%}
{{- bos_token -}}
{%- for m in turns -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('user and assistant must take turns') -}}
  {%- endif -%}
  {%- if m['role'] == 'user' -%}
    {{- '[INST] ' + (('<<SYS>>\n' + first + '\n<</SYS>>\n\n') if loop.first and first else '') + m['content'] -}}
    {{- ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m['content'] + ' </s>' -}}
  {%- endif -%}
{%- endfor -%}
"""

#: As above, but the system text goes into the last user turn.
INSTRUCTIONS_LAST = (
    "<s>{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST]{% if loop.last and first %}{{ first + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ ' ' + m.content }}</s>{% endif %}{% endfor %}"
)

#: No system role at all; the assistant has another name.
NO_SYSTEM = (
    "<s>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|open|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|shut|>\n{% endfor %}{% if add_generation_prompt %}<|open|>model\n{% endif %}"
)

#: Written over several lines, with nothing to take out the white space.
LOOSE = """\
{% for m in messages %}
    {% if m.role == 'user' %}
        Human: {{ m.content }}

    {% elif m.role == 'system' %}
        {{ m.content }}

    {% else %}
        Reply: {{ m.content }}</s>
    {% endif %}
{% endfor %}
    Reply:"""

#: Plain words for roles, and no way to ask for an answer: the prompt ends with the question.
NO_GENERATION_PROMPT = "{% for m in messages %}### {{ m.role | upper }}\n{{ m.content }}\n\n{% endfor %}"

#: Only contents: the prompt begins with the documents.
BARE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"

#: Keeps what follows the thinking of former answers; shows thinking nowhere.
THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|open|>' + m.role + '\n' + text + '<|shut|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|open|>assistant\n<think>\n' }}{% endif %}"
)

#: A word in the system text changes the end of the prompt, and is taken out of the text.
SWITCH = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|open|>system\n{{ first.replace('/fast', '') | trim }}<|shut|>"
    "{% for m in messages if m.role != 'system' %}<|open|>{{ m.role }}\n{{ m.content }}<|shut|>{% endfor %}"
    "<|open|>assistant\n{% if '/fast' in first %}<think></think>{% endif %}"
)

#: Shows only the system turn and the last turn.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'system' or loop.last %}<|open|>{{ m.role }}\n{{ m.content }}<|shut|>"
    "{% endif %}{% endfor %}<|open|>assistant\n"
)

#: Says the system text again before every user turn.
INSISTENT = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}<|open|>system\n{{ first }}<|shut|>{% endif %}"
    "<|open|>{{ m.role }}\n{{ m.content }}<|shut|>{% endfor %}<|open|>assistant\n"
)

#: Newest turn first.
BACKWARD = "{% for m in messages | reverse %}<|open|>{{ m.role }}\n{{ m.content }}<|shut|>{% endfor %}<|turn|>"

#: Says the first letters of each turn once more, as a title.
TITLED = (
    "{% for m in messages %}<|open|>{{ m.role }}: {{ m.content[:20] }}\n{{ m.content }}<|shut|>{% endfor %}<|turn|>"
)

#: Says which turns are long.
CURIOUS = (
    "{% for m in messages %}<|open|>{% if m.content | length > 1000 %}long {% endif %}{{ m.role }}\n"
    "{{ m.content }}<|shut|>{% endfor %}<|open|>assistant\n"
)

#: Knows a turn of documents of its own, which ends like all others.
DOCUMENTS_TURN = (
    "{% for m in messages %}{% if m.role != 'documents' %}{{ '<|open|>' + m.role + '\n' }}{% endif %}"
    "{{ m.content + '<|shut|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
)


def _each(content: str) -> str:
    return (
        "{% for m in messages %}<|open|>{{ m.role }}\n{{ " + content + " }}<|shut|>{% endfor %}"
        "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}"
    )


JSON = _each("m | tojson")
JSON_CONTENT = _each("m.content | tojson")
UPPER = _each("m.content | upper")
LOWER = _each("m.content | lower")
HTML = _each("m.content | e")
ONE_LINE = _each("m.content.split() | join(' ')")
INDENTED = _each("m.content | indent(2)")


def with_template(template: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with the control tokens of all templates, and ``template``."""
    fast = byte_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    if "think>" in template:
        fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = template
    return fast


DOCUMENTS = DocumentTemplate("* {text};", "* {title}: {text};")
TEXTS = ("One\n <b>.", 'Two "x" \\ & é')
SHORT = [("user", "What?")]
LONG = [("user", "Hi "), ("assistant", " Hello"), ("user", "What?")]
SYSTEM = ("system", "Be brief.")


def build(template: str, turns: list[tuple[str, str]], at: str) -> tuple[Prompt, PreTrainedTokenizerFast]:
    """The prompt of a conversation with two documents."""
    tokenizer = with_template(template)
    layout = PromptLayout(tokenizer, documents_in=at, template=DOCUMENTS)  # type: ignore[arg-type]  # a parameter
    documents = [layout.document_tokens(Document("", text)) for text in TEXTS]
    return layout.build([Message(*turn) for turn in turns], documents, links=None), tokenizer


def rendered(
    tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]], at: str, documents: str | None = None
) -> str:
    """What the template makes of the conversation with the documents written into it."""
    documents = "".join(f"* {text};" for text in TEXTS) if documents is None else documents
    turns = list(turns)
    if at == "user":
        turns[-1] = ("user", documents + turns[-1][1])
    elif at == "turn":
        turns.insert(-1, ("documents", documents))
    elif turns[0][0] == "system":
        turns[0] = ("system", turns[0][1] + documents)
    else:
        turns.insert(0, ("system", documents))
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
