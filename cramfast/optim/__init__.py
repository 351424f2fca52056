"""From gradients to changed weights.

All parameters lie in one flat buffer (`flat`), which one fused AdamW updates (`adamw`) or, for matrices, Muon (`muon`);
`schedule` says the learning rate, `sharding` which process keeps which part of the state, `make` builds what a config
asks for. Others may import every file but `flat`. Read `flat.py` first, then `adamw.py`.
"""
