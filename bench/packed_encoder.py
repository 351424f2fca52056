"""The encoder of cramfast/model/encoder.py in plain PyTorch modules on packed batches, with torch's FlashAttention:
what a careful user of stock parts would train. Parameters have the same names, so that weights can be exchanged."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.attention_peers import flash_attention, rotate_packed
from cramfast.config import ModelConfig
from cramfast.model.encoder import positions, rotary_tables


def norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.norm_bias)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def cover_tail(cu_seqlens: Tensor, tokens: int, longest: int) -> Tensor:
    """Offsets whose spare entries, all equal to the last, cut the padding behind the last sequence into sequences.

    FlashAttention leaves rows outside every sequence unwritten, and NaN in them reaches the weights' gradients.
    """
    used = cu_seqlens[-1]
    last_sequence = (cu_seqlens < used).sum()
    spare = (torch.arange(len(cu_seqlens), device=cu_seqlens.device) - last_sequence).clamp(min=0)
    return (cu_seqlens + spare * longest).clamp(max=tokens).to(torch.int32)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        width, hidden = config.width, config.feedforward
        self.heads = config.heads
        self.attn_norm = norm(config) if index > 0 or config.first_norm else nn.Identity()
        self.attn = nn.ModuleDict({"Wqkv": linear(width, 3 * width), "Wo": linear(width, width)})
        self.mlp_norm = norm(config)
        self.mlp = nn.ModuleDict({"Wi": linear(width, 2 * hidden), "Wo": linear(hidden, width)})

    def forward(self, x_ND: Tensor, cos_N2: Tensor, sin_N2: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        N, D = x_ND.shape
        qkv_N3HK = self.attn["Wqkv"](self.attn_norm(x_ND)).view(N, 3, self.heads, D // self.heads)
        mixed_NHK = flash_attention(*rotate_packed(qkv_N3HK, cos_N2, sin_N2), cu_seqlens, longest)
        x_ND = x_ND + self.attn["Wo"](mixed_NHK.reshape(N, D))
        gated_NF, linear_NF = self.mlp["Wi"](self.mlp_norm(x_ND)).chunk(2, dim=-1)
        return x_ND + self.mlp["Wo"](F.gelu(gated_NF) * linear_NF)


class PackedEncoder(nn.Module):
    """Rotary positions and global attention alone; every tensor shape is static."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {"tok_embeddings": nn.Embedding(config.vocab_size, config.width), "norm": norm(config)}
        )
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.final_norm = norm(config)
        self.head = nn.ModuleDict({"dense": linear(config.width, config.width), "norm": norm(config)})
        tables = rotary_tables(config.max_len, config.width // config.heads, config.rope_theta_global)
        for name, table_LK2 in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table_LK2, persistent=False)

    def loss(self, ids_N: Tensor, cu_seqlens: Tensor, masked_M: Tensor, target_M: Tensor, longest: int) -> Tensor:
        """Mean cross-entropy over the masked tokens, whose logits alone are computed."""
        cu_seqlens = cover_tail(cu_seqlens, len(ids_N), longest)
        place_N = positions(ids_N, cu_seqlens, longest)
        cos_N2, sin_N2 = self.cos[place_N], self.sin[place_N]
        x_ND = self.embeddings["norm"](self.embeddings["tok_embeddings"](ids_N))
        for layer in self.layers:
            x_ND = layer(x_ND, cos_N2, sin_N2, cu_seqlens, longest)
        hidden_MD = self.final_norm(x_ND.index_select(0, masked_M))
        hidden_MD = self.head["norm"](F.gelu(self.head["dense"](hidden_MD)))
        logits_MV = F.linear(hidden_MD, self.embeddings["tok_embeddings"].weight)
        return F.cross_entropy(logits_MV.float(), target_M, ignore_index=-100)
