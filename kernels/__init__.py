"""The public operators; installed as cramfast.kernels. Start with reference.py, which defines them in plain PyTorch."""

from cramfast.kernels.adamw import adamw
from cramfast.kernels.attention import varlen_attention
from cramfast.kernels.cross_entropy import masked_cross_entropy
from cramfast.kernels.glu import glu
from cramfast.kernels.layernorm import layernorm
from cramfast.kernels.layernorm_glu import layernorm_glu

__all__ = ["adamw", "glu", "layernorm", "layernorm_glu", "masked_cross_entropy", "varlen_attention"]
