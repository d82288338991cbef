"""Sort every causal language model class of transformers: exact, or refused with a reason. No third kind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from kvlink_core.conformance.check import check
from kvlink_core.conformance.tiny import tiny_config, tiny_model
from kvlink_core.errors import InputError, UnsupportedModelError
from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.models.key_recipe import RotaryModule, TableRole
from kvlink_core.models.spec import spec_from_config
from kvlink_core.text import first_line

EXACT, REFUSED = "exact", "refused"

_SHAPES = "its layers cache keys of different shapes; a document cache holds one shape for all layers."
_BORROWS = "has no cache of its own: it attends to that of the model it assists."

#: Why these are refused, where the walk itself would only see that something does not fit.
_KNOWN: Mapping[str, str] = {
    "bloom": "adds a bias by distance (ALiBi) instead of rotating its keys.",
    "mpt": "adds a bias by distance (ALiBi) instead of rotating its keys.",
    "ctrl": "adds a sinusoidal vector for its absolute position to each token.",
    "xglm": "adds a sinusoidal vector for its absolute position to each token.",
    "roformer": "its modelling code rotates by the order of tokens in a call; positions cannot be given to it.",
    "minimax": "its linear attention layers keep a recurrent state.",
    "xlstm": "is recurrent: it keeps a state and no keys.",
    "recurrent_gemma": "its recurrent layers keep a state.",
    "bamba": "its Mamba layers keep a recurrent state.",
    "granitemoehybrid": "its Mamba layers keep a recurrent state.",
    "mamba2": "is recurrent: it keeps a state and no keys.",
    "zamba": "its Mamba layers keep a recurrent state.",
    "zamba2": "its Mamba layers keep a recurrent state.",
    "lfm2_moe": "its convolution layers keep a state.",
    "rwkv": "is recurrent: it keeps a state and no keys.",
    "gemma4": _SHAPES,
    "gemma4_text": _SHAPES,
    "gemma4_unified": _SHAPES,
    "gemma4_unified_text": _SHAPES,
    "gemma4_assistant": _BORROWS,
    "gemma4_unified_assistant": _BORROWS,
    "gemma3n": "could not be built without timm, so it was never checked; its text model, `gemma3n_text`, is exact.",
    "prophetnet": "attends to several streams of predicted tokens, with biases by relative position.",
    "cpmant": "adds a bias by relative position instead of rotating its keys.",
    "whisper": "adds a vector for its absolute position to each token, and reads sound.",
    "xmod": "adds a vector for its absolute position to each token.",
    "reformer": "attends by hashing; it caches no keys and values per token.",
    "musicgen": "adds a sinusoidal vector for its absolute position to each token, and writes sound.",
    "musicgen_melody": "adds a sinusoidal vector for its absolute position to each token, and writes sound.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture: Hugging Face's ``model_type`` and class, what was found, and why or of what kind."""

    model_type: str
    class_name: str
    status: str
    remark: str


def model_types() -> tuple[str, ...]:
    """The ``model_type`` of every causal language model of the installed transformers."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def walk(
    names: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    device: str = "cpu",
) -> list[Row]:
    """Judge architectures (all, when none is named).

    Args:
        names: values of ``model_type``.
        progress: called with (architectures judged, in all).
        device: where to run them.

    Raises:
        InputError: a name that transformers does not have.
    """
    known = model_types()
    if odd := [n for n in names if n not in known]:
        raise InputError(f"transformers {transformers.__version__} has no architecture {odd[0]!r} for causal language.")
    wanted = names or known
    rows = []
    with quiet():
        for number, name in enumerate(wanted):
            rows.append(judge(name, device))
            progress(number + 1, len(wanted))
    return rows


def judge(model_type: str, device: str = "cpu") -> Row:
    """Build an architecture tiny and random, check it against the oracle, and say what came out."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]

    def refused(reason: str) -> Row:
        return Row(model_type, name, REFUSED, _KNOWN.get(model_type, reason))

    try:
        spec_from_config(tiny_config(model_type))
        lm = tiny_model(model_type, device=device)
    except UnsupportedModelError as error:
        return refused(str(error))
    # Broad on purpose: 189 classes made by others fail to be built tiny in as many ways, and all mean the same here.
    except Exception as error:
        return refused(f"could not be built at a tiny size, so it was never checked ({first_line(error)})")
    try:
        verdict = check(lm)
    except Exception as error:  # as above: whatever it raises, it does not run over a linked cache
        return refused(f"does not run over a linked cache ({first_line(error)})")
    if verdict.exact:
        return Row(model_type, name, EXACT, _kind(lm))
    table = next((n for n, m in lm.network.named_modules() if _is_position_table(n, m)), None)
    if table is not None:
        return refused(f"adds a vector for its absolute position to each token ({table.rpartition('.')[2]}).")
    return refused("its logits differ from the oracle's.")


def _is_position_table(name: str, module: torch.nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return isinstance(module, torch.nn.Embedding) and ("pos" in last or last in ("wpe", "pe"))


def _kind(lm: CausalLM) -> str:
    """What is special about how an architecture makes and keeps its keys."""
    recipes = lm.recipes
    rotated = [r for r in recipes.layers if r is not None]
    text = lm.network.config.get_text_config(decoder=True)
    kinds = []
    if any(r.slot == "value" for r in rotated):
        kinds.append("latent cache")
    if len(rotated) < len(recipes.layers):
        kinds.append("layers without RoPE")
    if any(r.slot == "key" and r.end - r.begin < recipes.key_dim for r in rotated):
        kinds.append("partial rotary")
    if any(r.after is not None for r in rotated):
        kinds.append("norm after RoPE")
    used = {a.source for r in rotated for a in r.args if isinstance(a, TableRole)}
    if sum(isinstance(recipes.sources[i], RotaryModule) for i in used) > 1:
        kinds.append("RoPE by kind of layer")
    types = set(getattr(text, "layer_types", None) or ())
    if "sliding_attention" in types or (not types and getattr(text, "sliding_window", None)):
        kinds.append("sliding window")
    if "chunked_attention" in types:
        kinds.append("chunked attention")
    if lm.masking != "asked":
        kinds.append("attention of its own")
    return ", ".join(kinds)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings are not heard: tiny configurations break many a rule of thumb that transformers warns about."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def to_json(rows: Sequence[Row]) -> str:
    """The table as ``kvlink_core/models/architectures.json`` holds it."""
    table = {r.model_type: {"class": r.class_name, "status": r.status, "remark": r.remark} for r in rows}
    return json.dumps({"transformers": transformers.__version__, "architectures": table}, indent=1) + "\n"


def from_json(text: str) -> tuple[str, list[Row]]:
    """Version of transformers and rows of a table that ``to_json`` wrote."""
    data = json.loads(text)
    table = data["architectures"].items()
    return data["transformers"], [Row(name, row["class"], row["status"], row["remark"]) for name, row in table]


TABLE = Path(__file__).parent.parent / "models" / "architectures.json"


def drift(rows: Sequence[Row]) -> list[str]:
    """How freshly judged rows differ from the table in the package, one line each; empty when they agree."""
    version, held = from_json(TABLE.read_text())
    if version != transformers.__version__:
        return [f"the table was made with transformers {version}; this is {transformers.__version__}"]
    before = {row.model_type: row for row in held}
    return [
        f"{row.model_type}: the table says {_short(before.get(row.model_type))}, found {_short(row)}"
        for row in rows
        if before.get(row.model_type) != row
    ]


def _short(row: Row | None) -> str:
    return "nothing" if row is None else f"{row.status} ({row.remark})" if row.remark else row.status
