// Every Cpu operator exists once per instruction set; the best one that this processor has is chosen at the first call.
#include "cpu_dispatch.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#ifdef CRAMFAST_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "accumulate.h"
#include "adamw.h"
#include "attention.h"
#include "cross_entropy.h"
#include "glu.h"
#include "layernorm.h"

namespace cramfast {
namespace {

enum class Isa { baseline, avx2, avx512, avx512_bf16, amx_bf16 };

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::amx_bf16: return "amx_bf16";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

#ifdef CRAMFAST_AMX
// Whether the processor has tiles of bfloat16, the system keeps them apart between processes, and this one may use them:
// Linux gives that on demand. Source: Intel SDM 1, 18; kernel.org, x86/xstate.
bool may_use_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!(d & amx_bf16) || !(d & amx_tile)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3u << 17;
  if ((low & tile_state) != tile_state) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

Isa best_isa() {
#ifdef CRAMFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
#ifdef CRAMFAST_AMX
    if (may_use_tiles()) return Isa::amx_bf16;
#endif
    return Isa::avx512_bf16;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// CRAMFAST_CPU=baseline|avx2|avx512|avx512_bf16|amx_bf16 takes a lower set than the best one, for tests and comparisons;
// never a higher one.
Isa chosen_isa() {
  const Isa best = best_isa();
  if (const char* wanted = std::getenv("CRAMFAST_CPU")) {
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16}) {
      if (std::strcmp(wanted, name_of(isa)) == 0 && isa <= best) return isa;
    }
  }
  return best;
}

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

}  // namespace

const char* cpu_isa() { return name_of(isa()); }

}  // namespace cramfast

#ifdef CRAMFAST_X86
#ifdef CRAMFAST_AMX
#define CRAMFAST_AMX_DECLARATION(op, Args) namespace cramfast::amx_bf16 { void op(Cpu, const Args&); }
#define CRAMFAST_AMX_CASE(op) case Isa::amx_bf16: return amx_bf16::op(device, args);
#else
#define CRAMFAST_AMX_DECLARATION(op, Args)
#define CRAMFAST_AMX_CASE(op)
#endif
#define CRAMFAST_CPU_OPERATOR(op, Args)                             \
  CRAMFAST_AMX_DECLARATION(op, Args)                                \
  namespace cramfast::avx512_bf16 { void op(Cpu, const Args&); }    \
  namespace cramfast::avx512 { void op(Cpu, const Args&); }         \
  namespace cramfast::avx2 { void op(Cpu, const Args&); }           \
  namespace cramfast::baseline { void op(Cpu, const Args&); }       \
  void cramfast::op(Cpu device, const Args& args) {                 \
    switch (isa()) {                                                \
      CRAMFAST_AMX_CASE(op)                                         \
      case Isa::avx512_bf16: return avx512_bf16::op(device, args);  \
      case Isa::avx512: return avx512::op(device, args);            \
      case Isa::avx2: return avx2::op(device, args);                \
      default: return baseline::op(device, args);                   \
    }                                                               \
  }
#else
#define CRAMFAST_CPU_OPERATOR(op, Args)                             \
  namespace cramfast::baseline { void op(Cpu, const Args&); }       \
  void cramfast::op(Cpu device, const Args& args) { baseline::op(device, args); }
#endif

CRAMFAST_CPU_OPERATOR(layernorm_fwd, LayerNormForward)
CRAMFAST_CPU_OPERATOR(layernorm_bwd, LayerNormBackward)
CRAMFAST_CPU_OPERATOR(glu_fwd, GluForward)
CRAMFAST_CPU_OPERATOR(glu_bwd, GluBackward)
CRAMFAST_CPU_OPERATOR(attention_fwd, AttentionForward)
CRAMFAST_CPU_OPERATOR(attention_bwd, AttentionBackward)
CRAMFAST_CPU_OPERATOR(cross_entropy, CrossEntropy)
CRAMFAST_CPU_OPERATOR(adamw, AdamW)
CRAMFAST_CPU_OPERATOR(accumulate, Accumulate)
CRAMFAST_CPU_OPERATOR(accumulate_rows, AccumulateRows)
