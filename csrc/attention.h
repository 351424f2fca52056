// Variable-length attention in both directions, with rotary positions and an optional local window.
//
//   q' = R(p) q,  k' = R(p) k          rotary: pairs (j, j + K/2) turned by p theta_j; p counts from the sequence start
//   z_ij = q'_i k'_j / sqrt(K) for |i - j| <= window,  P = softmax_j(z),  o_i = sum_j P_ij v_j
//   lse_i = log sum_j exp(z_ij), natural logarithm
//   dv_j = sum_i P_ij do_i,  dz_ij = P_ij (do_i v_j - sum_k do_ik o_ik),
//   dq_i = R(-p) sum_j dz_ij k'_j / sqrt(K),  dk_j = R(-p) sum_i dz_ij q'_i / sqrt(K)
//
// Nothing is padded: sequence s is rows [cu_seqlens[s], cu_seqlens[s + 1]); equal neighbours mean an empty one; rows
// from cu_seqlens[S] on belong to no sequence and get zeros. No atomics: every gradient has one owner, which sums in a
// fixed order. On a GPU max_seqlen chooses the form (attention_forms.h). Sources: Dao et al., arXiv:2205.14135
// (recomputation from the log-sum-exp); Su et al., arXiv:2104.09864.
#pragma once

#include "device.h"

namespace cramfast {

struct AttentionForward {
  const void* qkv;                 // (tokens, 3, heads, head_width)
  const std::int32_t* cu_seqlens;  // (sequences + 1,)
  const float* cos;                // (>= longest sequence, head_width / 2), or null: no rotary positions
  const float* sin;                // as cos
  void* out;                       // (tokens, heads, head_width)
  float* lse;                      // (heads, tokens)
  std::int64_t tokens, sequences, heads, head_width;
  std::int64_t max_seqlen;  // no sequence is longer
  std::int64_t window;      // largest |i - j|, negative: no limit
  DType dtype;
};

struct AttentionBackward {
  const void* dout;                // (tokens, heads, head_width)
  const void* qkv;                 // (tokens, 3, heads, head_width)
  const void* out;                 // (tokens, heads, head_width)
  const float* lse;                // (heads, tokens)
  const std::int32_t* cu_seqlens;  // (sequences + 1,)
  const float* cos;
  const float* sin;
  float* delta;  // (heads, tokens) scratch of the CUDA forms that are not whole on chip
  void* dqkv;    // (tokens, 3, heads, head_width)
  std::int64_t tokens, sequences, heads, head_width;
  std::int64_t max_seqlen;
  std::int64_t window;
  DType dtype;
};

void attention_fwd(Cpu device, const AttentionForward& args);
void attention_fwd(Cuda device, const AttentionForward& args);
void attention_bwd(Cpu device, const AttentionBackward& args);
void attention_bwd(Cuda device, const AttentionBackward& args);

}  // namespace cramfast
