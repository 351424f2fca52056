"""How much memory a training step takes, counted from what optim, model and the operators keep."""

import resource

from cramfast.config import TrainConfig
from cramfast.cost.roofline import element_size, masked_tokens, muon_parameters, parameter_count
from cramfast.kernels.cross_entropy import CHUNK_BYTES

CONTEXT_BYTES = 512 << 20  # of a GPU, for driver, kernels and libraries; assumed, measured on no card


def state_bytes(config: TrainConfig) -> int:
    """What stays from step to step: master weights, gradient and two moments (Muon: one) in float32, a half-precision
    copy, and a moving average where there is one."""
    copy = 0 if config.dtype == "float32" else element_size(config)
    return parameter_count(config.model) * (16 + copy + (4 if config.ema_decay else 0)) - 4 * muon_parameters(config)


def kept_bytes(config: TrainConfig, tokens: int) -> int:
    """What the forward pass of a microbatch keeps for the backward pass.

    A layer keeps its normalised input, the stream before and after attention (D each), q, k, v (3 D), the mixed values
    (D), the pre-activations (2 F) and what the gate makes of them (F); on a GPU the mixed values twice, since the
    floor's attention clears rows of no sequence in a copy. The last layer goes on with the masked rows after its
    attention. The loss keeps the gradients of its rows and, in float32, of the decoder.
    """
    model, M = config.model, masked_tokens(config, tokens)
    D, F = model.width, model.feedforward
    mixed = 2 * D if config.device == "cuda" else D
    layer, attention = 6 * D + mixed + 3 * F, 6 * D
    head = (6 if model.head else 3) * D
    rows = tokens * ((model.layers - 1) * layer + attention) + M * (2 * D + 3 * F + head)
    statistics = 4 * tokens * model.layers * (4 + model.heads)  # mean and 1 / deviation of two norms; log-sum-exp
    return rows * element_size(config) + 4 * model.vocab_size * D + statistics


def working_bytes(config: TrainConfig, tokens: int) -> int:
    """What comes and goes in the pass: gradients of one layer at most, and the logits of one chunk.

    A feed-forward block's backward pass makes the gradients of pre-activations and gate (3 F) and four tensors of width
    D; that of attention six.
    """
    D, F = config.model.width, config.model.feedforward
    return tokens * max(3 * F + 4 * D, 6 * D) * element_size(config) + CHUNK_BYTES[config.device]


def update_bytes(config: TrainConfig) -> int:
    """What comes and goes in Muon's update: the hidden matrices' gradient, unscaled and then clipped."""
    return 8 * muon_parameters(config)


def training_bytes(config: TrainConfig, tokens: int, baseline: int) -> int:
    """Peak memory of training with microbatches of `tokens`; `baseline` is what is taken before a model is there.

    The memory of a CUDA graph serves nothing else; on a CPU, update and pass use the same.
    """
    passing, update = kept_bytes(config, tokens) + working_bytes(config, tokens), update_bytes(config)
    return baseline + state_bytes(config) + (passing + update if config.device == "cuda" else max(passing, update))


def largest_microbatch(config: TrainConfig, memory_bytes: int, baseline: int) -> int:
    """The most tokens, in whole sequences, whose step the memory holds; 0 where not even one sequence fits."""
    fits, too_many = 0, 1
    while training_bytes(config, too_many * config.sequence_len, baseline) <= memory_bytes:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if training_bytes(config, middle * config.sequence_len, baseline) <= memory_bytes:
            fits = middle
        else:
            too_many = middle
    return fits * config.sequence_len


def resident_bytes() -> int:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
