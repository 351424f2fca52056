#include "attention.h"

#include "simd.h"

namespace cramfast::CRAMFAST_ISA {
void attention_fwd(Cpu, const AttentionForward&) {}
void attention_bwd(Cpu, const AttentionBackward&) {}
}  // namespace cramfast::CRAMFAST_ISA
