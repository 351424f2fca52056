"""Replaced-token detection: a small generator fills the masks, and the encoder says of every token whether it did.

The generator has the encoder's width and its embedding table, and a quarter of its layers. Both see the same packed
batch; the sampled words hang on the batch alone, so no random state is kept or saved.

Source: Clark et al., arXiv:2003.10555 (ELECTRA).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cramfast.config import ModelConfig
from cramfast.model.encoder import Encoder, flops_per_token

DETECTION_WEIGHT = 50.0  # ELECTRA's lambda: a binary loss is that much smaller than one over a vocabulary
GENERATOR_SHARE = 4  # the encoder has so many times its layers; ELECTRA found a quarter to a half best
SAMPLED_ROWS = 1024  # rows of logits held at once
BLOCK = 64  # divides every vocabulary


class Detector(nn.Module):
    """Weight and bias of the yes or no; vectors, so float32 and without weight decay."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))


class Discriminator(Encoder):
    """The encoder with the generator that trains it; the parameters of the encoder keep their names."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.generator = Encoder(generator_config(config))
        self.generator.embeddings.tok_embeddings = self.embeddings.tok_embeddings
        self.detector = Detector(config.width)

    def loss(self, batch) -> Tensor:
        """Masked-language-model loss of the generator plus 50 times the detection loss; 0-d float32.

        Microbatches are summed by the share of their rows that have a target. The detection loss is one of tokens, so
        it takes the share of its own in place of that: each token of an update weighs the same, as each target does.
        """
        self.generator.z_loss = self.z_loss
        tokens, targets = inside(batch).float().mean(), (batch.target_M >= 0).float().mean()
        return self.generator.loss(batch) + DETECTION_WEIGHT * self.detection_loss(batch) * (tokens / targets)

    def detection_loss(self, batch) -> Tensor:
        """Mean binary cross-entropy over the tokens of all sequences of a loader.Batch, in nats; 0-d float32.

        A sampled word that happens to be right counts as original. The samples let no gradient through.
        """
        with torch.no_grad():
            ids_N, replaced_N = self.corrupt(batch)
        hidden_ND = self.transform(self(ids_N, batch.cu_seqlens, batch.max_seqlen))
        logit_N = (hidden_ND @ self.detector.weight.to(hidden_ND.dtype)).float() + self.detector.bias
        loss_N = F.binary_cross_entropy_with_logits(logit_N, replaced_N, reduction="none")
        inside_N = inside(batch)
        return (loss_N * inside_N).sum() / inside_N.sum()

    def corrupt(self, batch) -> tuple[Tensor, Tensor]:
        """(N,) ids with a sample of the generator at every masked place; (N,) float32, 1 where it is another word."""
        hidden_MD, uniform_M = self.generator.masked_hidden(batch), uniform(batch.ids_N, batch.masked_index_M)
        rows = zip(hidden_MD.split(SAMPLED_ROWS), uniform_M.split(SAMPLED_ROWS), strict=True)
        sampled_M = torch.cat([sample(self.generator.logits(hidden), chance) for hidden, chance in rows])
        masked_M = batch.target_M >= 0
        kept_M = batch.ids_N[batch.masked_index_M].long()
        ids_N = batch.ids_N.index_copy(0, batch.masked_index_M, torch.where(masked_M, sampled_M, kept_M).int())
        replaced_M = (masked_M & (sampled_M != batch.target_M)).float()
        return ids_N, torch.zeros_like(batch.ids_N, dtype=torch.float32).index_copy(0, batch.masked_index_M, replaced_M)


def inside(batch) -> Tensor:
    """(N,) bool, whether a token belongs to a sequence."""
    return torch.arange(len(batch.ids_N), device=batch.ids_N.device) < batch.cu_seqlens[-1]


def generator_config(config: ModelConfig) -> ModelConfig:
    """The generator's shape."""
    return replace(config, layers=max(1, config.layers // GENERATOR_SHARE))


def uniform(ids_N: Tensor, index_M: Tensor) -> Tensor:
    """(M,) float32 in (0, 1) for the masked places of a batch: a hash of the place and of the whole masked batch, which
    is a pure function of (seed, epoch, index)."""
    place_N = torch.arange(len(ids_N), device=ids_N.device)
    digest = ((ids_N + 1) * mixed(place_N)).sum()
    return ((mixed(index_M + digest) & 0xFFFFFF) + 0.5) / (1 << 24)


def mixed(x: Tensor) -> Tensor:
    """int64 -> int64 with every bit hanging on all of x: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # >> repeats the sign bit; the mask clears it
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def sample(logits_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """(M,) int64 entries drawn from softmax(logits) by the inverse of its distribution function, in two stages.

    The running sums are products with a triangle of ones: torch.cumsum adds in no fixed order on a GPU.
    """
    p_MBC = logits_MV.float().softmax(-1).unflatten(-1, (-1, BLOCK))
    of_block_MB = p_MBC.sum(-1)
    below_MB = running(of_block_MB)
    left_M1 = uniform_M[:, None] * below_MB[:, -1:]
    block_M1 = (below_MB <= left_M1).sum(-1, keepdim=True).clamp(max=below_MB.shape[1] - 1)
    left_M1 = left_M1 - (below_MB - of_block_MB).gather(1, block_M1)
    p_MC = p_MBC.gather(1, block_M1[..., None].expand(-1, -1, BLOCK))[:, 0]
    inside_M1 = (running(p_MC) <= left_M1).sum(-1, keepdim=True).clamp(max=BLOCK - 1)
    return (block_M1 * BLOCK + inside_M1)[:, 0]


def running(x_MB: Tensor) -> Tensor:
    """Running sums along the rows."""
    return x_MB @ torch.ones(x_MB.shape[1], x_MB.shape[1], device=x_MB.device).triu()


def detection_flops_per_token(config: ModelConfig, mask_fraction: float, mean_len: float) -> float:
    """FLOPs per training token: the generator's, its logits once more for the samples, and the encoder's with its head
    over every token but without the decoder; see model.flops_per_token."""
    generator = flops_per_token(generator_config(config), mask_fraction, mean_len)
    samples = mask_fraction * 2 * config.width * config.vocab_size
    head = 6 * config.width**2 if config.head else 0
    return generator + samples + flops_per_token(config, 0.0, mean_len) + head
