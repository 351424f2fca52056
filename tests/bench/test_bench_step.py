"""bench.step's GPU side as far as a CPU can prove it: the stock encoder against ours, the systems on a pretended
device, phases from pretended kernels."""

import pytest
import torch

from bench import attention_peers, goals, gpu_systems, packed_encoder, phases, step
from bench.packed_encoder import PackedEncoder, cover_tail
from bench.systems import Options
from cramfast.batches.loader import Batch
from cramfast.config import ModelConfig
from cramfast.errors import UserError
from cramfast.kernels import reference
from cramfast.model.encoder import Encoder

TINY = {"layers": 2, "width": 64, "heads": 2, "feedforward": 48, "vocab_size": 512}


def reference_attention(q, k, v, cu_seqlens, longest):
    assert int(cu_seqlens[-1]) == len(q) and int(cu_seqlens.diff().max()) <= longest  # no row is left unwritten
    return reference.varlen_attention(torch.stack([q, k, v], 1), cu_seqlens, longest)


@pytest.fixture
def no_gpu_needed(monkeypatch, one_thread):
    """The GPU systems on the CPU: no compilation, no page-locked memory, no graph, attention of the reference."""
    monkeypatch.setattr(gpu_systems, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu_systems.machine, "take_kernels", lambda _: {})
    monkeypatch.setattr(gpu_systems, "graph_choice", lambda config: (False, "no GPU"))
    monkeypatch.setattr(packed_encoder, "flash_attention", reference_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from cramfast.prepare import prepare

    folder = tmp_path_factory.mktemp("text")
    words = ["the", "kernel", "moves", "each", "tensor", "once", "and", "the", "step", "waits", "for", "nothing"]
    lines = [" ".join(words[i % 12 :] + words[: i % 7]) for i in range(600)]
    (folder / "text.txt").write_text("\n".join(lines))
    return prepare((str(folder / "text.txt"),), folder / "out", vocab_size=512, documents="lines")


def test_the_tail_becomes_sequences():
    offsets = torch.tensor([0, 5, 9, 9, 9, 9, 9], dtype=torch.int32)
    assert cover_tail(offsets, 30, 8).tolist() == [0, 5, 9, 17, 25, 30, 30]
    assert cover_tail(offsets, 9, 8).tolist() == offsets.tolist()


def test_the_stock_encoder_computes_what_ours_does(no_gpu_needed):
    config = ModelConfig(**TINY, max_len=16)
    torch.manual_seed(0)
    ours, stock = Encoder(config), PackedEncoder(config)
    stock.load_state_dict(ours.state_dict())
    ids = torch.randint(512, (40,), dtype=torch.int32)
    offsets = torch.tensor([0, 16, 17, 33, 33, 33], dtype=torch.int32)
    masked, target = torch.tensor([3, 16, 30, 0]), torch.tensor([9, 8, 7, -100])
    loss = ours.loss(Batch(ids, offsets, masked, target, 16, 33))
    theirs = stock.loss(ids, offsets, masked, target, 16)
    torch.testing.assert_close(theirs, loss)
    loss.backward(), theirs.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cramfast", "transformers compiled", "packed FlashAttention compiled"])
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'", "ignore:torch.cuda.amp.GradScaler")
def test_every_system_takes_steps(no_gpu_needed, prepared, name):
    options = Options(data=(), device="cuda", dtype="float32", sequence_len=16, batch_sequences=4, **TINY)
    system = gpu_systems.build(name, options, prepared)
    parameter = next((system.microbatch.model if name == "cramfast" else system.model).parameters())
    before = parameter.detach().clone()
    assert system.step() > 0 and system.step() > 0
    assert not torch.equal(parameter, before)


def test_an_unknown_system_is_refused(prepared):
    with pytest.raises(UserError, match="not known on a GPU"):
        gpu_systems.build("jax", Options(data=()), prepared)
    with pytest.raises(UserError, match="not known on a CPU"):
        step.build("jax", Options(data=(), device="cpu"), prepared)


def test_sizes_follow_the_device(monkeypatch):
    assert Options(data=(), device="cpu").resolved().layers == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    options = Options(data=(), width=1024).resolved()
    assert (options.device, options.layers, options.width, options.vocab_size) == ("cuda", 16, 1024, 32768)
    assert options.dtype == "bfloat16" and options.systems[0] == "cramfast"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>", "matmul"),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x4_tn", "matmul"),
        ("void cramfast::attention_short_bwd_kernel<cramfast::bf16, 64>", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("void cramfast::layernorm_bwd_kernel<cramfast::bf16, 8>", "norm"),
        ("triton_per_fused_native_layer_norm_3", "norm"),
        ("void cramfast::glu_fwd_kernel<cramfast::bf16, 8, Gelu>", "gate"),
        ("triton_poi_fused_gelu_mul_7", "gate"),
        ("void cramfast::cross_entropy_kernel<cramfast::bf16, 8, 4>", "loss"),
        ("triton_red_fused__log_softmax_nll_loss_forward_12", "loss"),
        ("void cramfast::adamw_kernel<cramfast::bf16>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, add>", "other"),
    ],
)
def test_kernels_find_their_phase(name, expected):
    assert phases.phase(name) == expected


def test_gaps_are_what_no_kernel_fills():
    kernels = [("gemm", 0, 60), ("attention", 50, 80), ("gemm", 90, 100)]  # the second overlaps the first by 10
    found = phases.breakdown(kernels, steps=2)
    assert found["launch_gaps"] == pytest.approx(10.0)
    assert found["phases_ms"] == pytest.approx({"matmul": 0.035, "attention": 0.015, "gaps": 0.005})
    assert list(found["phases_ms"]) == ["matmul", "attention", "gaps"]


def test_goals_of_the_step():
    common = {"layers": 16, "width": 768, "sequence_len": 128, "dtype": "bfloat16", "gpu": "card"}
    rows = [
        common | {"system": "cramfast", "tokens_per_s": 9.0, "ours_speedup": 1.0, "mfu": 44.0, "launch_gaps": 2.0},
        common | {"system": "transformers compiled", "tokens_per_s": 3.0, "ours_speedup": 3.0},
        common | {"system": "packed FlashAttention compiled", "fault": "out of memory"},
    ]
    found = {(v.goal.measure, v.goal.over): v.text() for v in goals.verdicts(goals.step_rows(rows))}
    assert found["mfu", ()] == "44.00 %, missed by 1.00"
    assert found["launch_gaps", ()] == "2.00 %, reached"
    assert found["speedup", ("transformers compiled",)] == "3.00×, reached"
    assert found["speedup", ("packed FlashAttention compiled",)] == "not measured"


def test_flash_attention_is_torchs_own():
    assert attention_peers.varlen_attn is torch.nn.attention.varlen.varlen_attn


def test_a_turn_has_some_steps_however_slow_they_are():
    class Slow:
        steps = 0

        def step(self, phases):
            self.steps += 1
            return 10

    slow = Slow()
    assert step.turn(slow, "cpu", 0.0)["tokens_per_s"] > 0 and slow.steps == step.LEAST_STEPS > 1
