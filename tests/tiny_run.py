"""A run folder with a small random model and a tokenizer, made in a moment, for tests that only read runs."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from cramfast.config import ModelConfig, TrainConfig, to_json
from cramfast.evaluate.examples import Examples
from cramfast.model.encoder import Encoder

SENTENCES = (
    "The river carried heavy timber from the northern forest to the harbour every spring.",
    "A careful reader notices that both arguments depend on the same hidden assumption.",
    "Light travels faster than sound!",
    "The committee published its report in March, and the minister answered within a week.",
    "Most birds build their nests before the summer rain begins, but some species wait.",
    "Is the kernel faster? It is: twelve tests agree, and one benchmark (the last) does not.",
    "Winter wheat needs cold weather to flower, which farmers in the valley know very well.",
    "He opened the window, looked at the garden and wrote another letter to his brother.",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_config(**changes) -> ModelConfig:
    """3 layers of 64, scores of order one so that a fault shows."""
    shape = {"vocab_size": 512, "layers": 3, "width": 64, "heads": 2, "feedforward": 96, "max_len": 128}
    return ModelConfig(**(shape | {"init": "normal", "init_std": 0.15} | changes))


def tiny_tokenizer() -> Tokenizer:
    """Lower-cased WordPiece of 512 entries."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=512, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def make_run(folder: Path, config: ModelConfig) -> Path:
    """Write a run folder; every weight of the model is random, norms included."""
    torch.manual_seed(0)
    model = Encoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    save_file({name: p.detach() for name, p in model.named_parameters()}, checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "model": to_json(config)}))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "heldout.txt").write_text("\n".join(SENTENCES) + "\n")
    (folder / "config.json").write_text(json.dumps(to_json(TrainConfig(model=config))))
    counts = {"documents": 900, "tokens": 52_000, "characters": 230_000}
    manifest = {"version": 1, "sources": ["text/a.txt"], "splits": {"train": counts}, "unigram_entropy_nats": 6.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    return folder


def rows(steps: int) -> list[dict]:
    """What metrics.jsonl holds after some steps, an evaluation before the first and after the last among it."""
    kernels = [{"op": "glu", "implementation": "cpp", "reason": "C++ for the CPU"}]
    held = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "heldout_loss": 6.9, "heldout_accuracy": 0.0}
    written = [{"run": {"device": "a CPU", "parameters": 123456, "kernels": kernels}}, held]
    for step in range(1, steps + 1):
        place = {"step": step, "tokens": step * 4096, "flops": step * 1e9, "seconds": step * 0.5}
        spent = {"fraction": step / steps, "microbatches": 1, "lr": 1e-3, "loss": 6.9 - step / steps, "skipped": 0}
        written.append(place | spent | {"grad_norm": 1.0, "tokens_per_s": 8192.0, "mfu": 0.4})
    written.append(held | {"step": steps, "tokens": steps * 4096, "flops": steps * 1e9, "seconds": steps * 0.5})
    written[-1] |= {"heldout_loss": 5.25, "heldout_accuracy": 0.125}
    return written


def toy(classes):
    """Sentences with and without the word that decides the label."""
    texts, labels = [], []
    for number in range(64):
        label = number % 2
        words = SENTENCES[number % len(SENTENCES)].split()[:4]
        texts.append((" ".join([*words, "winter" if label else "harbour"]),))
        labels.append(float(label) if classes else 2.5 * label)
    return Examples(texts, labels)
