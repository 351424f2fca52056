"""The encoder: embeddings, layers, prediction head, and the number of operations they cost.

`encoder.Encoder` is the model that is trained, evaluated and exported; `electra.Discriminator` is the pair of models of
`--objective rtd`; `dropout` draws its zeros by place. They call `cramfast.kernels` and know neither text nor optimizer.
Others may import `encoder` and `electra`. Read `encoder.py` first.
"""
