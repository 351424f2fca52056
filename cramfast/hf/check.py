"""Does the installed transformers compute what our encoder computes? Asked of every exported folder."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from cramfast.errors import UserError
from cramfast.hf.tokens import compare_tokens
from cramfast.model.encoder import Encoder

TOLERANCE = 1e-4  # largest difference of a float32 logit; a right export of a short training stays near 1e-5
ROUNDING = 10.0  # the large logits of a long training may differ by so many times the rounding error of transformers
SHORT_SENTENCES, SHORT_TOKENS = 6, 64


def max_difference(folder: Path, model: Encoder, run_dir: Path) -> float:
    """Largest difference between our logits and those of transformers on held-out text.

    A padded batch of short sentences, and one sequence longer than the local window; some tokens are [MASK].

    Args:
        folder: an exported folder.
        model: the encoder it came from, float32, on the CPU.
        run_dir: holds heldout.txt and the tokenizer.json of the training.

    Raises:
        UserError: transformers cannot load the folder, names missing or unexpected weights, splits text into other
            tokens, or gives logits that differ by more than TOLERANCE and than float32 rounding explains.
    """
    tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer.json"))
    sentences = read_sentences(run_dir)
    with quiet_transformers():
        compare_tokens(folder, tokenizer, sentences)
        stock = _load(folder)
        largest = 0.0
        with torch.no_grad():
            for batch in _batches(model, tokenizer, sentences):
                theirs = _stock_logits(stock, batch, model.config.pad_id)
                difference = float((theirs - packed_logits(model, batch)).abs().max())
                largest = max(largest, difference)
                if difference <= TOLERANCE:
                    continue
                exact = _stock_logits(copy.deepcopy(stock).double(), batch, model.config.pad_id)
                rounding = float((theirs - exact).abs().max())
                if not difference <= ROUNDING * rounding:  # also true of NaN
                    raise UserError(
                        f"export check: logits of transformers differ by {difference:.3g}, allowed {TOLERANCE:.0e} or "
                        f"{ROUNDING:g} times its own rounding of {rounding:.1e} — the export was not kept; this is a "
                        "fault in cramfast or weights that are not finite"
                    )
    return largest


def read_sentences(run_dir: Path) -> list[str]:
    """The held-out sentences of a run.

    Raises:
        UserError: none there.
    """
    path = Path(run_dir) / "heldout.txt"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise UserError(f"{path}: missing or empty — restore it from the prepared text (one sentence a line)")
    return sentences


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and remarks on loading; the previous state comes back."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load(folder: Path):
    from transformers import AutoConfig, AutoModelForMaskedLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.reference_compile = False  # 4.57 would compile the model on a GPU machine
        config.tie_word_embeddings = True  # also where the decoder was not trained: its logits still compare the rest
        stock, info = AutoModelForMaskedLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"export check: transformers cannot load the folder ({error}) — the export was not kept"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise UserError(f"export check: transformers reports {kind} {names} — the export was not kept")
    return stock.eval()


def _batches(model: Encoder, tokenizer: Tokenizer, sentences: list[str]) -> Iterator[list[list[int]]]:
    limit = model.config.max_len
    mask = tokenizer.token_to_id("[MASK]")
    short = [tokenizer.encode(s).ids[: min(limit, SHORT_TOKENS)] for s in sentences[:SHORT_SENTENCES]]
    short.append(short[0][:5])  # one that is padded for certain
    yield [_with_masks(ids, mask) for ids in short]
    # Twice the window, so that the first and the last tokens of local layers do not see each other.
    wanted = min(limit, max(2 * model.config.window + 2, 128))
    long: list[int] = []
    for repeat in range(wanted):
        long += tokenizer.encode(sentences[repeat % len(sentences)]).ids
        if len(long) >= wanted:
            break
    yield [_with_masks(long[:wanted], mask)]


def _with_masks(ids: list[int], mask: int) -> list[int]:
    return [mask if place % 7 == 3 else token for place, token in enumerate(ids)]


def _stock_logits(stock, batch: list[list[int]], pad_id: int) -> Tensor:
    """(N, V) logits of transformers at the tokens that are no padding."""
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), pad_id)
    attended = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attended[row, : len(tokens)] = 1
    return stock(input_ids=ids, attention_mask=attended).logits[attended.bool()]


def packed_logits(model: Encoder, batch: list[list[int]]) -> Tensor:
    """(N, V) logits of our encoder for every token of the sequences, end to end."""
    lengths = torch.tensor([0, *map(len, batch)])
    ids_N = torch.tensor([token for tokens in batch for token in tokens], dtype=torch.int32)
    return model.logits(model(ids_N, lengths.cumsum(0).int(), max(map(len, batch))))
