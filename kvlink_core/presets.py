"""Layouts of published checkpoints, by name: what ``"preset": NAME`` in a ``kvlink.json`` stands for.

A preset is a set of keys of that file; keys beside it override it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The turns of Llama 3 without the dates that its own template adds, and the documents' turn: its text ends with the
# token that ends every turn, and it has no header.
_LLAMA3_CHAT = (
    "<|begin_of_text|>"
    "{% if messages[0]['role'] != 'system' %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "You are an AI assistant. Answer from the documents that you are given.<|eot_id|>"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] != 'documents' %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% endif %}"
    "{{ message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_MEM_START, _MEM_END, _FIRST_LINK, _LINKS = 128254, 128255, 128011, 5
_PLACES = (_MEM_START - _FIRST_LINK) // _LINKS

#: KVLink5 (arXiv 2502.16002) on Llama 3.2: Shiyu-Lab/Llama1B-KVLink5 and Shiyu-Lab/Llama3B-KVLink5.
_KVLINK5_LLAMA32: Mapping[str, Any] = {
    "chat_template": _LLAMA3_CHAT,
    "documents_in": "turn",
    "document_template": "Document [{place+1}](Title: ) {text}\n",
    "titled_document_template": "Document [{place+1}](Title: {title}) {text}\n",
    "mem_start": (_MEM_START,),
    "mem_end": (_MEM_END,),
    "link_tokens": {
        "k": _LINKS,
        "ids": tuple(range(_FIRST_LINK, _FIRST_LINK + _PLACES * _LINKS)),
        "per_place": True,
    },
    "default_linker": "link-tokens",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {"kvlink5-llama3.2": _KVLINK5_LLAMA32}
