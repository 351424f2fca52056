"""Which optimizer a config asks for."""

from collections.abc import Mapping

import torch
from torch import nn

from cramfast.config import TrainConfig
from cramfast.optim.adamw import AdamW, StableAdamW
from cramfast.optim.flat import FlatParameters
from cramfast.optim.muon import Muon
from cramfast.runtime.distributed import ALONE, Team

OPTIMIZERS: Mapping[str, type[AdamW]] = {"adamw": AdamW, "stable_adamw": StableAdamW, "muon": Muon}


def make_optimizer(
    config: TrainConfig, model: nn.Module, team: Team = ALONE, kinds: Mapping[str, type[AdamW]] = OPTIMIZERS
) -> AdamW:
    """The optimizer that the config names; the model's Parameters become views into its flat buffers.

    Args:
        kinds: the class behind each name.
    """
    own = {"rate": config.muon_rate} if config.optimizer == "muon" else {}
    return kinds[config.optimizer](
        FlatParameters(model, getattr(torch, config.dtype)), beta1=config.beta1, beta2=config.beta2,
        eps=config.adam_eps, weight_decay=config.weight_decay, max_norm=config.max_norm, ema_decay=config.ema_decay,
        team=team, **own,
    )  # fmt: skip
