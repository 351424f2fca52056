"""Every throughput modification, and what the model, its data or its optimizer are without it.

A switch turns one modification off. Switches combine, because each overrides another method: of the encoder, of the
batch source, of the optimizer. The trainer knows none of them; switched.py puts them in its way.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cramfast import kernels
from cramfast.batches import pack
from cramfast.batches.feed import training_source
from cramfast.batches.loader import BatchSource, Source
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.kernels import dispatch, reference
from cramfast.kernels.linear import linear
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW
from cramfast.optim.make import OPTIMIZERS

DROPOUT = 0.1  # BERT's
LONG = 512  # BERT's sequence length


class SeparateGate(Encoder):
    """LayerNorm, matrix and gate of the feed-forward block as three autograd nodes of our kernels."""

    def feedforward(self, layer, delta_ND, stream_ND):
        y_ND, stream_ND = self.norm(layer.mlp_norm, delta_ND, stream_ND)
        gates_N2F = self.biased(layer.mlp, "Wi", linear(y_ND, layer.mlp.Wi.weight))
        h_NF = kernels.glu(gates_N2F, self.config.activation)
        return self.drop(self.biased(layer.mlp, "Wo", linear(h_NF, layer.mlp.Wo.weight))), stream_ND

    def biased(self, part: nn.Module, name: str, y_NE: Tensor) -> Tensor:
        return y_NE


class Biases(SeparateGate):
    """A bias on all four matrices of a layer: 0.2 % more parameters at 4 x 256."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            for part in (layer.attn, layer.mlp):
                for name, matrix in list(part.named_children()):
                    part.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(matrix.out_features)))

    def biased(self, part, name, y_NE):
        return y_NE + getattr(part, f"{name}_bias").to(y_NE.dtype)

    def qkv(self, layer, y_ND):
        return self.biased(layer.attn, "Wqkv", super().qkv(layer, y_ND))

    def output(self, layer, mixed_ND):
        return self.biased(layer.attn, "Wo", super().output(layer, mixed_ND))


class DensePrediction(Encoder):
    """Logits of every token, and a last layer that carries all of them; the loss is the same."""

    def loss(self, batch):
        hidden_ND = self(batch.ids_N, batch.cu_seqlens, batch.max_seqlen)
        target_N = torch.full_like(batch.ids_N, -100, dtype=torch.int64)
        target_N[batch.masked_index_M] = batch.target_M
        decoder_VD = self.embeddings.tok_embeddings.weight
        return kernels.masked_cross_entropy(self.transform(hidden_ND), decoder_VD, target_N, self.z_loss)


class MaterialisedScores(Encoder):
    """Attention in a padded rectangle, with scores and probabilities of every pair of tokens in memory."""

    def attention(self, qkv_N3HK, places, rotary, window):
        def attend(q_SHLK, k_SHLK, v_SHLK, mask):
            scores_SHLL = q_SHLK @ k_SHLK.transpose(-1, -2) * q_SHLK.shape[-1] ** -0.5
            scores_SHLL = scores_SHLL.masked_fill(~mask, float("-inf"))
            return torch.softmax(scores_SHLL, -1, dtype=torch.float32).to(v_SHLK.dtype) @ v_SHLK

        return padded_attention(attend, qkv_N3HK, places, rotary, window)


class TorchAttention(Encoder):
    """Attention in a padded rectangle, by torch.nn.functional.scaled_dot_product_attention."""

    def attention(self, qkv_N3HK, places, rotary, window):
        attend = F.scaled_dot_product_attention
        return padded_attention(attend, qkv_N3HK, places, rotary, window)


def padded_attention(attend: Callable, qkv_N3HK, places, rotary, window) -> Tensor:
    """(N, H, K) as kernels.varlen_attention, by attend(q, k, v, mask) on (S, H, L, K); empty sequences are left out."""
    cu_seqlens, max_seqlen = places.cu_seqlens, places.max_seqlen
    lengths_S = cu_seqlens.diff().long()
    starts_S, lengths_S = cu_seqlens[:-1].long()[lengths_S > 0], lengths_S[lengths_S > 0]
    place_L = torch.arange(max_seqlen, device=qkv_N3HK.device)
    real_SL = place_L < lengths_S[:, None]
    row_SL = torch.where(real_SL, starts_S[:, None] + place_L, 0)
    q_SLHK, k_SLHK, v_SLHK = qkv_N3HK[row_SL].unbind(2)
    if rotary is not None:
        cos, sin = (table[:max_seqlen].repeat(len(row_SL), 1) for table in rotary)
        q_SLHK, k_SLHK = (reference.rotate(t.flatten(0, 1), cos, sin).view(t.shape) for t in (q_SLHK, k_SLHK))
    mask = real_SL[:, None, None]
    if window is not None:
        mask = mask & ((place_L[:, None] - place_L).abs() <= window)
        mask = mask | ~real_SL[:, None, :, None]  # a padded row that saw nothing would be NaN
    mixed_SHLK = attend(*(t.transpose(1, 2) for t in (q_SLHK, k_SLHK, v_SLHK)), mask)
    out_NHK = torch.zeros_like(qkv_N3HK[:, 0])
    return out_NHK.index_copy(0, row_SL[real_SL], mixed_SHLK.transpose(1, 2)[real_SL])


class Dropout(Encoder):
    """BERT's dropout of the embedding and of each block's output, in training mode."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = DROPOUT


class PaddedSource(BatchSource):
    """A microbatch holds only as many sequences as have slots of sequence_len tokens in it; the rest is padding.

    The padding lies together at the end, where it goes through every matrix as it would behind each sequence; our
    attention passes over it, and the attention of the other switches makes its rectangle of the sequences anyway.
    Shapes are static: room for the masked tokens of a microbatch that is a tenth fuller than the average one.
    """

    def __init__(self, *arguments, sequence_len: int, batch_tokens: int, **more):
        slots = batch_tokens // sequence_len
        more |= {"sequence_len": sequence_len, "batch_tokens": slots * sequence_len, "max_sequences": slots}
        super().__init__(*arguments, **more)
        self.useful = (float(self.lengths.mean()) + pack.SPECIALS_PER_SEQUENCE) / sequence_len

    def batch(self, epoch, index, mask_fraction):
        batch = super().batch(epoch, index, mask_fraction)
        M = round(min(1.0, 1.1 * self.useful) * mask_fraction * self.batch_tokens)
        return replace(batch, masked_index_M=batch.masked_index_M[:M], target_M=batch.target_M[:M])


class CrossDocumentSource(BatchSource):
    """Naive packing: every sequence is a full one, and attends across the borders of the documents in it."""

    def batch(self, epoch, index, mask_fraction):
        batch = super().batch(epoch, index, mask_fraction)
        used, L = int(batch.cu_seqlens[-1]), self.sequence_len
        ends = torch.arange(L, used + L, L, dtype=torch.int32).clamp(max=used)
        cu_seqlens = torch.full_like(batch.cu_seqlens, used)
        cu_seqlens[0] = 0
        cu_seqlens[1 : len(ends) + 1] = ends
        return replace(batch, cu_seqlens=cu_seqlens)


class PerTensorAdamW(AdamW):
    """torch.optim.AdamW and clip_grad_norm_, tensor by tensor, in their defaults; the moments lie where ours do."""

    def __init__(self, flat, **options):
        super().__init__(flat, **options)
        masters, gradients, means, squares = (
            dict(flat.views(buffer)) for buffer in (flat.master, flat.grad, self.exp_avg, self.exp_avg_sq)
        )
        groups = [{"params": [], "weight_decay": self.weight_decay}, {"params": [], "weight_decay": 0.0}]
        self.parameters, self.gradients, self.halves = [], list(gradients.values()), []
        for name, (begin, shape) in flat.places.items():
            parameter = nn.Parameter(masters[name])
            groups[begin >= flat.matrices_end]["params"].append(parameter)
            self.parameters.append(parameter)
            if flat.half is not None and begin < flat.matrices_end:
                self.halves.append(flat.half[begin : begin + shape.numel()].view(shape))
        self.torch = torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=self.eps)
        for parameter, name in zip(self.parameters, flat.places, strict=True):
            step = self.scalars[1].cpu().clone()
            self.torch.state[parameter] = {"step": step, "exp_avg": means[name], "exp_avg_sq": squares[name]}

    def update(self):
        lr, step, inverse_scale = self.scalars[:3].tolist()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.mul_(inverse_scale)
            self.torch.state[parameter]["step"].fill_(step)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm or float("inf"))
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self.torch.param_groups:
                group["lr"] = lr
            self.torch.step()
            self.scalars[1] += 1
        self.scalars[3], self.scalars[4] = norm, float(not finite)
        for half, parameter in zip(self.halves, self.parameters, strict=False):  # the matrices stand first
            half.copy_(parameter)


@dataclass(frozen=True)
class Switch:
    """What takes the place of one modification.

    Attributes:
        config: keys of TrainConfig with the value they have without it.
        kernels: (operator, implementation) for dispatch.override.
        encoder, source, optimizer: the classes that take the place of ours.
    """

    config: dict[str, Any] = field(default_factory=dict)
    kernels: tuple[tuple[str, str], ...] = ()
    encoder: type[Encoder] | None = None
    source: type[BatchSource] | None = None
    optimizer: type[AdamW] | None = None


SWITCHES: dict[str, Switch] = {
    "separate_gate": Switch(encoder=SeparateGate),
    "biases": Switch(encoder=Biases),
    "dense_prediction": Switch(encoder=DensePrediction),
    "padding": Switch(source=PaddedSource),
    "cross_document": Switch(source=CrossDocumentSource),
    "torch_norm_and_gate": Switch(
        kernels=(("layernorm", "reference"), ("glu", "reference"), ("layernorm_glu", "reference"))
    ),
    "materialised_scores": Switch(encoder=MaterialisedScores),
    "torch_attention": Switch(encoder=TorchAttention),
    "per_tensor_adamw": Switch(optimizer=PerTensorAdamW),
    "float32": Switch(config={"dtype": "float32"}),
    "bfloat16": Switch(config={"dtype": "bfloat16"}),
    "float16": Switch(config={"dtype": "float16"}),
    "half_accumulation": Switch(config={"dtype": "float16", "half_accumulation": True}),
    "no_graph": Switch(config={"graph": "off"}),
    "dropout": Switch(encoder=Dropout),
    "length_512": Switch(config={"sequence_len": LONG}),
}


@dataclass(frozen=True)
class Variant:
    """A set of switches taken together."""

    names: tuple[str, ...]

    def __post_init__(self):
        for name in self.names:
            if name not in SWITCHES:
                raise UserError(f"switch {name!r} does not exist — one of {', '.join(SWITCHES)}")
        if sum(s.source is not None for s in self.switches) > 1:
            raise UserError(f"switches {', '.join(self.names)}: two that lay out the text — take one of them")

    @property
    def switches(self) -> list[Switch]:
        return [SWITCHES[name] for name in self.names]

    def config(self, config: TrainConfig) -> TrainConfig:
        """The config with the switches' values."""
        changes = {key: value for switch in self.switches for key, value in switch.config.items()}
        if config.optimizer != "adamw" and any(switch.optimizer for switch in self.switches):
            raise UserError(f"a switch of AdamW with optimizer={config.optimizer}: not possible — plan with adamw")
        pairs = tuple(f"{op}={name}" for switch in self.switches for op, name in switch.kernels)
        return replace(config, **(changes | {"kernels": config.kernels + pairs}))

    def _class(self, part: str, ours: type) -> type:
        others = tuple(dict.fromkeys(found for s in self.switches if (found := getattr(s, part)) is not None))
        if not others:
            return ours
        # A class that another one in the list refines would stand before it and hide it.
        kept = tuple(c for c in others if not any(c is not d and issubclass(d, c) for d in others))
        return kept[0] if len(kept) == 1 else type("And".join(c.__name__ for c in kept), kept, {})

    @property
    def encoder(self) -> type[Encoder]:
        return self._class("encoder", Encoder)

    def batches(self, config: TrainConfig, prepared: Path) -> Source:
        """Training microbatches; only those of a switch differ from feed.training_source.

        Raises:
            UserError: a switch that lays out the text, in a config whose sequences grow.
        """
        replaced = self._class("source", BatchSource)
        if replaced is BatchSource:
            return training_source(config, prepared, config.microbatch_tokens)
        if config.short_sequence_len:
            raise UserError(f"switch {self.names[0]} with short_sequence_len: not possible — set it to 0 in the plan")
        return replaced(
            prepared, "train", sequence_len=config.sequence_len, batch_tokens=config.microbatch_tokens,
            seed=config.seed, masking=config.masking, order=config.order,
        )  # fmt: skip

    @property
    def optimizers(self) -> dict[str, type[AdamW]]:
        """The class behind each name of config.optimizer, with what a switch puts in AdamW's place."""
        return {**OPTIMIZERS, "adamw": self._class("optimizer", AdamW)}

    @contextmanager
    def kernels(self, device: str) -> Iterator[None]:
        """The switches' implementations of operators, for the length of a with block."""
        with ExitStack() as stack:
            for switch in self.switches:
                for op, implementation in switch.kernels:
                    stack.enter_context(dispatch.using(op, implementation, device=device))
            yield
