"""What the CUDA runtime refuses comes back in its own words, not as a verdict on the card."""

import pytest
import torch

from cramfast.kernels import emulated, extension

BUILT = extension.module is not None and extension.module.cuda
# Without a driver every call into the runtime fails, which is the test.
without_gpu = pytest.mark.skipif(not BUILT or torch.cuda.is_available(), reason="needs CUDA kernels and no GPU")
REFUSED = r"\(cudaError(InsufficientDriver|NoDevice|SystemDriverMismatch|StubLibrary)\)"


@without_gpu
def test_a_launch_is_refused_in_the_runtimes_words():
    with pytest.raises(RuntimeError, match=f"^empty launch: .*{REFUSED}$"):
        extension.module.empty_launch(extension.module.Cuda(0))


@without_gpu
def test_the_number_of_multiprocessors_is_not_guessed():
    with pytest.raises(RuntimeError, match=f"^number of multiprocessors: .*{REFUSED}$"):
        extension.module.adamw_partials(extension.module.Cuda(0), 10**9)


@without_gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_what_cannot_be_asked_is_no_missing_bfloat16(dtype):
    """It was "bfloat16 needs sm_80 or later; this device takes float16", whatever had gone wrong."""
    module, code = extension.module, extension.DTYPE_CODES[dtype]
    with pytest.raises(RuntimeError, match=f"^(compiled code for this device|layernorm_glu_fold): .*{REFUSED}$"):
        module.layernorm_glu_fwd(module.Cuda(0), *[0] * 12, 4, 64, 32, 0, 1e-5, code)
    with pytest.raises(RuntimeError, match=f"^attention_check: .*{REFUSED}$"):
        module.attention_fwd(module.Cuda(0), *[0] * 6, 4, 1, 1, 64, 4, -1, code)


@pytest.mark.skipif(bool(emulated.missing_reason()), reason=emulated.missing_reason() or "can be built")
def test_an_empty_launch_ends():
    module = emulated.load(750)
    assert module.empty_launch(module.Cuda(0)) is None
