"""The checks of bench/sass.py on listings of known content; no compiler needed."""

from dataclasses import replace

import pytest

from bench import sass, triton_sass
from bench.sass import Kernel, launched_bytes, needs_tensor_cores, needs_wide_loads, parse_ptxas, parse_sass

LOG = """\
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_75'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 52 registers, used 1 barriers, 64 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_75'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 400 bytes cmem[0]
"""
SASS = """\
\t\tFunction : _Z1aPf
        /*0000*/    LDG.E.128.CONSTANT.SYS R4, [R2] ;
        /*0010*/    LDG.E.64 R4, [R2] ;
        /*0018*/    LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0020*/    STL [R1], R0 ;
        /*0030*/    HMMA.16816.F32 R0, R4, R8, R0 ;
\t\tFunction : _Z1bPf
        /*0000*/    EXIT ;
"""


def test_listings_are_read():
    assert parse_ptxas(LOG) == {
        "_Z1aPf": {"stack_bytes": 8, "spill_bytes": 16, "registers": 52, "shared_bytes": 64},
        "_Z1bPf": {"stack_bytes": 0, "spill_bytes": 0, "registers": 10, "shared_bytes": 0},
    }
    assert parse_sass(SASS) == {
        "_Z1aPf": {"wide_loads": 2, "local_accesses": 1, "tensor_core": 1},
        "_Z1bPf": {"wide_loads": 0, "local_accesses": 0, "tensor_core": 0},
    }


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        (75, 256, 128, 28928, 2),  # registers and shared memory both allow two
        (75, 128, 128, 33024, 1),  # half of 64 KiB and a little: one
        (86, 256, 40, 0, 6),  # threads
        (86, 32, 16, 0, 16),  # blocks
        (90, 512, 64, 0, 2),  # registers
        (90, 512, 65, 0, 1),  # one register more, rounded up to 72
    ],
)
def test_blocks_on_a_multiprocessor(architecture, threads, registers, shared, blocks):
    assert Kernel("k", architecture, threads, registers, shared, 0, 0).blocks == blocks


def test_each_problem_is_named():
    bad = Kernel("glu_fwd_kernel<bf16, 8, Gelu>", 86, 256, 32, 0, 8, 16, wide_loads=0, local_accesses=3, tensor_core=0)
    assert len(bad.problems()) == 3
    prints = Kernel("attention_check_kernel", 86, 256, 52, 0, 32, 0, wide_loads=0, local_accesses=32, tensor_core=0)
    assert not prints.problems()  # values for printf
    assert replace(prints, spill_bytes=8).problems() and replace(prints, name="attention_short_fwd_kernel").problems()
    assert not needs_wide_loads("glu_fwd_kernel<bf16, 1, Gelu>") and not needs_wide_loads("layernorm_sum_kernel")
    assert needs_wide_loads("cross_entropy_kernel<f16, 8, 0>") and needs_wide_loads("adamw_norm_kernel")
    assert needs_tensor_cores("attention_short_fwd_kernel<f16, 64>", 75)
    assert needs_tensor_cores("attention_short_bwd_kernel<bf16, 64>", 86)
    assert not needs_tensor_cores("attention_short_bwd_kernel<bf16, 64>", 75)  # has no body
    assert not needs_tensor_cores("attention_plain_fwd_kernel<64>", 86)
    assert not needs_tensor_cores("glu_fwd_kernel<f16, 8, Gelu>", 86)
    assert needs_tensor_cores("layernorm_glu_fwd_kernel<f16, Gelu>", 75)
    assert needs_wide_loads("layernorm_glu_fold_kernel<bf16>")
    assert Kernel("attention_short_fwd_kernel<f16, 64>", 86, 128, 32, 0, 0, 0, 1, 0, 0).problems()


def test_dynamic_shared_memory_is_counted():
    assert launched_bytes("attention_short_fwd_kernel<f16, 64>", 75) == 32 << 10
    assert launched_bytes("attention_short_bwd_kernel<f16, 64>", 75) == 64 << 10
    assert launched_bytes("attention_short_bwd_kernel<bf16, 64>", 86) == 96 << 10
    assert launched_bytes("attention_tiled_fwd_kernel<f16, 64>", 75) == 16896
    assert launched_bytes("attention_tiled_bwd_kernel<f16, 64, false>", 86) == 33792
    assert launched_bytes("attention_tiled_bwd_kernel<bf16, 128, true>", 90) == 49408
    assert launched_bytes("glu_fwd_kernel<f16, 8, Gelu>", 86) == 0


def test_the_committed_table_is_compared_where_the_compiler_is_the_same():
    kernels = [Kernel(name, 86, 256, 40, 0, 0, 0, 4, 0, 0) for name in ("a_kernel", "b_kernel")]
    kept = sass.table(kernels, "V13.0.88")
    assert sass.compare(kept, kernels, "V13.0.88") == ([], "")
    changed, reason = sass.compare(kept, [kernels[0], replace(kernels[1], registers=41)], "V13.0.88")
    assert [line[:12] for line in changed] == ["+ | b_kernel", "- | b_kernel"] and not reason
    assert len(sass.compare(kept, kernels[:1], "V13.0.88")[0]) == 1
    assert "another compiler" in sass.compare(kept, kernels[:1], "V13.1.0")[1]
    assert "not counted" in sass.compare(kept, [replace(kernels[0], wide_loads=None)], "V13.0.88")[1]


def test_what_a_triton_kernel_must_not_have():
    good = Kernel(
        "layernorm_glu_kernel<bfloat16>", 86, 256, 142, 57600, 0, 0, wide_loads=4, local_accesses=0, tensor_core=32
    )
    assert triton_sass.problems(good) == []
    bad = Kernel(
        "layernorm_glu_kernel<float16>", 86, 256, 255, 115712, 0, 8, wide_loads=0, local_accesses=1, tensor_core=0
    )
    assert triton_sass.problems(bad) == [
        "8 bytes of registers spilled", "1 accesses to local memory",
        "115712 bytes of shared memory, a block has 101376", "no 16-byte global load", "no tensor-core instruction",
    ]  # fmt: skip
