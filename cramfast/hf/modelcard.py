"""README.md of an exported model: what it is, what it reached, how to load it."""

import json
import math
import re
from pathlib import Path

from cramfast.config import ModelConfig, to_json
from cramfast.pages.scoretable import ScoreTable
from cramfast.session.record import Record
from cramfast.session.summary import manifest_rows, tiles

SCORES = "## Scores"

STOCK = """## Load it

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="path/to/this/folder")
print(fill(f"The capital of France is {fill.tokenizer.mask_token}."))
```

`AutoModelForSequenceClassification` and `AutoModelForTokenClassification` load it for fine-tuning.

This is a ModernBERT for `transformers` 4.57 and 5.x.{resaved}
"""

# Of global and local layers in 4.57, where save_pretrained of 5.x left the keys out that it reads.
DEFAULT_THETAS = (160_000.0, 10_000.0)
RESAVED = """ `config.json` holds the keys of both; `save_pretrained` of 5.x
drops those that 4.57 reads, which then computes other logits without a warning. **After re-saving under 5.x, put this
`config.json` back.**"""

OWN = """## Load it

Stock `transformers` cannot load this folder: {reason}. With cramfast installed:

```python
from cramfast.export import load

model, tokenizer = load("path/to/this/folder")
ids = tokenizer.encode("The capital of France is [MASK].").ids
```

`model(ids_N, cu_seqlens, max_seqlen)` returns the hidden states of packed sequences, `model.logits` the scores of every
vocabulary entry. The folder holds safetensors and JSON only.
"""

DETECTED = """## Load it

```python
from transformers import AutoModel

encoder = AutoModel.from_pretrained("path/to/this/folder")
```

It was pretrained by replaced-token detection (ELECTRA), so **it fills no masks**: no decoder was trained. The
prediction head (`head.*`) is the one under the detector, which is not exported. `AutoModelForMaskedLM` gives it new,
random decoder weights, and says so. `AutoModelForSequenceClassification`
and `AutoModelForTokenClassification` load the folder for fine-tuning.
"""

WORDS_ALONE = """
Words that are given one by one (`is_split_into_words=True`, as scripts for named entities do) are the tokens that they
are in a sentence, but for signs that stand before a word, such as an opening bracket.
"""

WORDS_ALONE_DIFFER = """
**Words that are given one by one (`is_split_into_words=True`) are other tokens than in a sentence**, not seen in
training: for named entities, join the words by spaces and align labels by `return_offsets_mapping`.
"""

NO_HEAD = """
The model was trained without a prediction head. Here it has one that changes nothing, so masked-language-model logits
are exact, while hidden states from `AutoModel` come before the weight of the final norm.
"""


def card(
    record: Record, config: ModelConfig, difference: float, own_loader_reason: str, words_alone: bool | None = None
) -> str:
    """The model card as Markdown.

    Args:
        record: of the run.
        config: of the model.
        difference: largest difference to transformers' logits, NaN when not compared.
        own_loader_reason: why stock transformers cannot load the folder, "" when it can.
        words_alone: whether words given one by one are the tokens that they are in a sentence; None: not tried.
    """
    detected = record.config.get("objective") == "rtd"
    pipeline = "feature-extraction" if detected else "fill-mask"
    head = {"library_name": "cramfast" if own_loader_reason else "transformers", "pipeline_tag": pipeline}
    tags = ["bert", "replaced-token-detection" if detected else "masked-language-modeling", "cramfast"] + (
        [] if own_loader_reason else ["modernbert"]
    )
    front = (
        "".join(f"{key}: {value}\n" for key, value in head.items()) + "tags:\n" + "".join(f"- {tag}\n" for tag in tags)
    )
    loading = OWN.format(reason=own_loader_reason) if own_loader_reason else DETECTED if detected else STOCK
    if not own_loader_reason:
        resaved = (config.rope_theta_global, config.rope_theta_local) != DEFAULT_THETAS
        loading = loading.replace("{resaved}", RESAVED if resaved else "")
    if own_loader_reason and detected:
        loading += "\nIt was pretrained by replaced-token detection: its `logits` are untrained, it fills no masks.\n"
    if not own_loader_reason and not config.head:
        loading += NO_HEAD
    if words_alone is not None:
        loading += WORDS_ALONE if words_alone else WORDS_ALONE_DIFFER
    figures = tiles(record) + [(key, str(record.run[key])) for key in ("device",) if key in record.run]
    parts = [
        f"---\n{front}---",
        f"# {record.name}",
        f"A BERT-class encoder ({config.layers} layers × {config.width}, sequences of up to {config.max_len} tokens), "
        f"pretrained from raw text by {'replaced-token detection' if detected else 'masked language modelling'} with "
        "cramfast." + _averaged(record.config),
        "## Figures\n\n" + _table(figures) + _checked(difference, own_loader_reason),
        loading.strip(),
        "## Data\n\n" + (_table(manifest_rows(record.manifest)) or "The run noted nothing about its text."),
        "## Training configuration\n\n```json\n"
        + json.dumps(_published(record.config) or to_json(config), indent=1)
        + "\n```",
    ]
    return with_scores("\n\n".join(parts) + "\n", record.scores)


def with_scores(text: str, tables: list[ScoreTable]) -> str:
    """A model card with these tables as its section on scores: in place of the one it has, else before the data."""
    section = "\n\n".join([SCORES, *(table.markdown() for table in tables)]) + "\n\n" if tables else ""
    if f"\n{SCORES}\n" in text:
        before, rest = text.split(f"{SCORES}\n", 1)
        following = re.search("^## ", rest, re.M)
        return before + section + (rest[following.start() :] if following else "")
    before, data, after = text.partition("## Data\n")
    return before + (section + data if data else "\n" + section) + after


def _published(config: dict) -> dict:
    """The training configuration without folder names, which are nobody's business once the model is shared."""
    data = [source if source.startswith("hf:") else Path(source).name for source in config.get("data", [])]
    tokenizer = Path(config.get("tokenizer", "")).name
    return config | {"data": data, "tokenizer": tokenizer} if config else {}


def _averaged(config: dict) -> str:
    decay = config.get("ema_decay")
    return f" The weights are the moving average of those in training (decay {decay})." if decay else ""


def _checked(difference: float, own_loader_reason: str) -> str:
    if own_loader_reason:
        return ""
    if math.isnan(difference):
        return "\n\nThe logits were not compared with transformers at export."
    import transformers

    return (
        f"\n\nLogits on held-out text, `transformers` {transformers.__version__} against the training code in float32: "
        f"largest difference {difference:.1e}."
    )


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
