"""The encoder on our operators: ModernBERT's mathematics, so that stock transformers loads the result.

Dimension letters (suffix of every tensor): N tokens of all sequences end to end, S sequences, D width, H heads,
K head width, F feed-forward width, V vocabulary, M masked tokens, L longest sequence.

The residual stream is never added to by itself: each block hands its output `delta` to the next norm, which adds it to
`stream` and normalises in one pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cramfast import kernels
from cramfast.config import ModelConfig
from cramfast.kernels.accumulate import accumulate_rows
from cramfast.kernels.linear import linear
from cramfast.kernels.places import Places
from cramfast.model.dropout import dropout


class Norm(nn.Module):
    """Weight and bias of one LayerNorm; float32 whatever the activations are."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)


class Embeddings(nn.Module):
    """Parameters of the token table (V, D), its norm and, with sinusoidal positions, their scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.norm = Norm(config.width, config.norm_bias)
        if config.positions == "sinusoidal":
            self.position_scale = nn.Parameter(torch.tensor([config.width**-0.5]))


class Attention(nn.Module):
    """Parameters of attention: Wqkv (3 D, D) and Wo (D, D), without biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.Wo = nn.Linear(config.width, config.width, bias=False)


class FeedForward(nn.Module):
    """Parameters of the gated block: Wi (2 F, D) and Wo (D, F), without biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # The first F rows are activated, the last F multiply them: the order of Hugging Face and of the paper alike.
        self.Wi = nn.Linear(config.width, 2 * config.feedforward, bias=False)
        self.Wo = nn.Linear(config.feedforward, config.width, bias=False)


class Layer(nn.Module):
    """Parameters of one layer: attention and feed-forward block, each behind its norm; Encoder.block computes it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        if index > 0 or config.first_norm:
            self.attn_norm = Norm(config.width, config.norm_bias)
        else:
            self.attn_norm = None
        self.attn = Attention(config)
        self.mlp_norm = Norm(config.width, config.norm_bias)
        self.mlp = FeedForward(config)
        self.is_global = index % config.global_every == 0


class Head(nn.Module):
    """Parameters of the prediction head before the decoder: dense (D, D) and norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=False)
        self.norm = Norm(config.width, config.norm_bias)


class TokenLookup(torch.autograd.Function):
    """weight[ids]; the gradient is summed in float32, because [MASK] alone adds thousands of rows to one.

    Where the weight has `row_sums` (V, D), float32, its rows are added there and autograd gets none: a gradient of the
    whole table for a few of its rows is most of the memory that a small batch moves.
    """

    @staticmethod
    def forward(ctx, ids_N, weight_VD):
        ctx.save_for_backward(ids_N)
        ctx.rows, ctx.dtype = weight_VD.shape[0], weight_VD.dtype
        ctx.row_sums_VD = getattr(weight_VD, "row_sums", None)
        return F.embedding(ids_N, weight_VD)

    @staticmethod
    def backward(ctx, grad_ND):
        (ids_N,) = ctx.saved_tensors
        if ctx.row_sums_VD is not None:
            accumulate_rows(ctx.row_sums_VD, ids_N.int(), grad_ND.contiguous())
            return None, None
        wide_ND = grad_ND.to(torch.promote_types(grad_ND.dtype, torch.float32))
        grad_VD = torch.ops.aten.embedding_dense_backward(wide_ND, ids_N, ctx.rows, -1, False)
        return None, grad_VD.to(ctx.dtype)


class SelectRows(torch.autograd.Function):
    """x[index] for distinct rows, so that the gradient is a copy: torch's index_select adds, slowly on a CPU and in
    no fixed order on a GPU."""

    @staticmethod
    def forward(ctx, x_ND, index_M):
        ctx.save_for_backward(index_M)
        ctx.rows = x_ND.shape[0]
        return x_ND.index_select(0, index_M)

    @staticmethod
    def backward(ctx, grad_MD):
        (index_M,) = ctx.saved_tensors
        return grad_MD.new_zeros(ctx.rows, grad_MD.shape[1]).index_copy_(0, index_M, grad_MD), None


class Encoder(nn.Module):
    """Bidirectional encoder over packed sequences, with the tied masked-language-model decoder.

    Source: Warner et al., arXiv:2412.13663 (ModernBERT); Geiping and Goldstein, arXiv:2212.14034 (crammed BERT).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.dropout = 0.0  # for fine-tuning; pretraining has none
        self.z_loss = 0.0  # for pretraining: weight of (log Z)^2 in the loss
        self.fills_masks = True  # False where the decoder was never trained: replaced-token detection
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.final_norm = Norm(config.width, config.norm_bias)
        self.head = Head(config) if config.head else None
        if config.positions == "rotary":
            for name, theta in (("global", config.rope_theta_global), ("local", config.rope_theta_local)):
                cos_LK2, sin_LK2 = rotary_tables(config.max_len, config.width // config.heads, theta)
                self.register_buffer(f"{name}_cos", cos_LK2, persistent=False)
                self.register_buffer(f"{name}_sin", sin_LK2, persistent=False)
        else:
            table_LD = sinusoidal_table(config.max_len, config.width)
            self.register_buffer("position_table", table_LD, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every matrix anew from torch's global generator; norms become the identity."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            std = self.config.init_std
            if self.config.init == "normal":
                weight.normal_(0.0, std)
                continue
            if name.endswith((".Wo.weight", "head.dense.weight")):  # Megatron-LM: keeps the stream's variance near 1
                std /= math.sqrt(2 * self.config.layers)
            nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)

    def forward(self, ids_N: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Encode packed sequences.

        Args:
            ids_N: (N,), token ids of all sequences end to end; rows after the last sequence belong to none.
            cu_seqlens: (S + 1,), int32, offsets of the sequences; equal neighbours mean an empty one.
            max_seqlen: length of the longest sequence, in tokens; at most config.max_len.

        Returns:
            (N, D) hidden states after the final norm, in the dtype of the matrices.
        """
        delta_ND, stream_ND = self.body(ids_N, cu_seqlens, max_seqlen)
        return self.norm(self.final_norm, delta_ND, stream_ND)[0]

    def loss(self, batch) -> Tensor:
        """Mean cross-entropy over the masked tokens of a loader.Batch, in nats, plus z_loss (log Z)^2; 0-d float32."""
        hidden_MD = self.masked_hidden(batch)
        decoder_VD = self.embeddings.tok_embeddings.weight
        return kernels.masked_cross_entropy(self.transform(hidden_MD), decoder_VD, batch.target_M, self.z_loss)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """(M, V) scores of every vocabulary entry from hidden states after the final norm."""
        return F.linear(self.transform(hidden_MD), self.embeddings.tok_embeddings.weight)

    def masked_hidden(self, batch) -> Tensor:
        """(M, D) hidden states after the final norm, at the masked positions alone: the rest is never predicted."""
        delta_MD, stream_MD = self.body(batch.ids_N, batch.cu_seqlens, batch.max_seqlen, batch.masked_index_M)
        return self.norm(self.final_norm, delta_MD, stream_MD)[0]

    def transform(self, hidden_MD: Tensor) -> Tensor:
        """The prediction head before the decoder, if there is one."""
        if self.head is None:
            return hidden_MD
        return self.norm(self.head.norm, F.gelu(linear(hidden_MD, self.head.dense.weight)))[0]

    def body(
        self, ids_N: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows_M: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(delta_ND, stream_ND) after the last layer; their sum is what the final norm sees.

        With `rows_M`, distinct indices, (M, D) of these rows alone: nothing else reads the others once the attention of
        the last layer has mixed them, so they go no further.
        """
        config = self.config
        x_ND = TokenLookup.apply(ids_N, self.embeddings.tok_embeddings.weight)
        if config.positions == "sinusoidal":
            place_ND = self.position_table[positions(ids_N, cu_seqlens, max_seqlen)]
            x_ND = x_ND + (self.embeddings.position_scale * place_ND).to(x_ND.dtype)
        stream_ND = self.drop(self.norm(self.embeddings.norm, x_ND)[0])
        delta_ND, places = None, Places(cu_seqlens, ids_N.shape[0], max_seqlen)
        for layer in self.layers:
            kept_M = rows_M if layer is self.layers[-1] else None
            delta_ND, stream_ND = self.block(layer, delta_ND, stream_ND, places, kept_M)
        return delta_ND, stream_ND

    def block(
        self, layer: Layer, delta_ND: Tensor | None, stream_ND: Tensor, places: Places, kept_M: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer: its own delta_ND, and the stream with the deltas before that added; none before layer 0.

        With `kept_M`, distinct indices, only these rows go on once attention has mixed them all.
        """
        if layer.attn_norm is None:
            y_ND = stream_ND
        elif delta_ND is None:
            y_ND = self.norm(layer.attn_norm, stream_ND)[0]
        else:
            y_ND, stream_ND = self.norm(layer.attn_norm, delta_ND, stream_ND)
        mixed_ND = self.attend(layer, y_ND, places)
        if kept_M is not None:
            mixed_ND, stream_ND = SelectRows.apply(mixed_ND, kept_M), SelectRows.apply(stream_ND, kept_M)
        return self.feedforward(layer, self.drop(self.output(layer, mixed_ND)), stream_ND)

    def attend(self, layer: Layer, y_ND: Tensor, places: Places) -> Tensor:
        """(N, D) values mixed by the attention of all heads, before the output matrix."""
        config = self.config
        qkv_N3HK = self.qkv(layer, y_ND).view(-1, 3, config.heads, config.width // config.heads)
        rotary = None
        if config.positions == "rotary":
            cos, sin = (self.global_cos, self.global_sin) if layer.is_global else (self.local_cos, self.local_sin)
            rotary = (cos, sin)
        window = None if layer.is_global else config.window // 2
        return self.attention(qkv_N3HK, places, rotary, window).flatten(1)

    def qkv(self, layer: Layer, y_ND: Tensor) -> Tensor:
        """(N, 3 D) queries, keys and values of all heads."""
        return linear(y_ND, layer.attn.Wqkv.weight)

    def output(self, layer: Layer, mixed_ND: Tensor) -> Tensor:
        """(N, D) attention's delta from what attend() mixed."""
        return linear(mixed_ND, layer.attn.Wo.weight)

    def feedforward(self, layer: Layer, delta_ND: Tensor, stream_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The feed-forward block's own delta_ND, and the stream with `delta_ND` added."""
        norm, config = layer.mlp_norm, self.config
        h_NF, stream_ND = kernels.layernorm_glu(
            delta_ND, norm.weight, norm.bias, layer.mlp.Wi.weight, config.activation, stream_ND, config.norm_eps
        )
        return self.drop(linear(h_NF, layer.mlp.Wo.weight)), stream_ND

    def attention(self, qkv_N3HK: Tensor, places: Places, rotary, window: int | None) -> Tensor:
        """(N, H, K), as kernels.varlen_attention."""
        return kernels.varlen_attention(qkv_N3HK, places.cu_seqlens, places.max_seqlen, rotary, window, places)

    def drop(self, x_ND: Tensor) -> Tensor:
        """Dropout, of the embedding and of each block's output, in training mode and if there is any."""
        return dropout(x_ND, self.dropout) if self.training and self.dropout else x_ND

    def norm(self, norm: Norm, x_ND: Tensor, residual_ND: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return kernels.layernorm(x_ND, norm.weight, norm.bias, residual_ND, self.config.norm_eps)


def rotary_tables(length: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (length, head_width / 2) float32, of p * theta^(-2j / head_width)."""
    inverse_K2 = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle_LK2 = torch.outer(torch.arange(length, dtype=torch.float32), inverse_K2)
    return angle_LK2.cos(), angle_LK2.sin()


def sinusoidal_table(length: int, width: int) -> Tensor:
    """(length, width) float32: sines in even columns, cosines in odd ones (Vaswani et al., arXiv:1706.03762)."""
    inverse = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def positions(ids_N: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(N,) int64 place of each token in its sequence; static shapes and no host sync."""
    token_N = torch.arange(ids_N.shape[0], device=ids_N.device, dtype=cu_seqlens.dtype)
    sequence_N = torch.searchsorted(cu_seqlens[1:], token_N, right=True)
    return (token_N - cu_seqlens[sequence_N]).clamp(max=max_seqlen - 1).long()


def flops_per_token(config: ModelConfig, mask_fraction: float, mean_len: float) -> float:
    """FLOPs of matmuls and attention per training token, forward and backward.

    3 * (layers * (2 * (4 D^2 + 3 D F) + 4 D * attended) - (1 - mask_fraction) * 2 * (D^2 + 3 D F)
         + mask_fraction * (2 D^2 [head] + 2 D V)):
    a multiply-add is two, and the backward pass costs twice the forward one.
    `attended` is mean_len, or in local layers at most the window. The second term is what the last layer spares
    (Encoder.masked_hidden); with it added back, the paper's model at 25 % masks and length 128 takes its 623 MFLOP.
    """
    width = config.width
    after_attention = width**2 + 3 * width * config.feedforward
    matrices = 3 * width**2 + after_attention
    total = -(1 - mask_fraction) * 2.0 * after_attention
    for index in range(config.layers):
        is_global = index % config.global_every == 0
        attended = mean_len if is_global else min(mean_len, 2 * (config.window // 2) + 1)
        total += 2 * matrices + 4 * width * attended
    total += mask_fraction * (2 * width * config.vocab_size + (2 * width**2 if config.head else 0))
    return 3.0 * total
