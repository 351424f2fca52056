// The choice between the CUDA forms of attention, and the check of the offsets before any of them.
#include <stdexcept>
#include <string>

#include "attention_forms.h"
#include "device_code.h"

namespace cramfast {
namespace {

constexpr int threads = 256;

// Offsets that do not start at 0, decrease, pass the tokens or leave a sequence too long would make the kernels read
// and write outside the tensors; the host cannot look at them without waiting for the device. One block, a few
// microseconds, in a kernel of its own: none of those after it runs once it has trapped, and none pays for printf.
__global__ void __launch_bounds__(threads)
    attention_check_kernel(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t tokens,
                           std::int64_t max_seqlen) {
  using Long = long long;  // printf's
  const Long count = sequences, most = max_seqlen, rows = tokens;
  for (Long s = threadIdx.x; s <= count; s += threads) {
    const Long begin = cu_seqlens[s], end = s < count ? cu_seqlens[s + 1] : begin;
    if (s == 0 && begin != 0) stop("attention: cu_seqlens must start at 0, not at %lld\n", begin);
    if (end < begin) {
      stop("attention: cu_seqlens decreases from %lld to %lld after sequence %lld of %lld\n", begin, end, s, count);
    }
    if (end - begin > most) {
      stop("attention: sequence %lld has %lld tokens, more than max_seqlen %lld\n", s, end - begin, most);
    }
    if (end > rows) stop("attention: cu_seqlens reaches %lld after sequence %lld, of %lld tokens\n", end, s, rows);
  }
}

template <class Args>
void check_offsets(Cuda device, const Args& args) {
  launch("attention_check", attention_check_kernel, device, 1, threads, 0, args.cu_seqlens, args.sequences, args.tokens,
         args.max_seqlen);
}

template <class Args>
bool is_short(const Args& args) {
  if (args.max_seqlen > attention_tiled_max) {
    throw std::invalid_argument("attention: the CUDA kernels take sequences of up to " +
                                std::to_string(attention_tiled_max) + " tokens in half precision, not " +
                                std::to_string(args.max_seqlen));
  }
  return args.max_seqlen <= attention_short_max;
}

}  // namespace

void attention_fwd(Cuda device, const AttentionForward& args) {
  check_offsets(device, args);
  if (args.dtype == DType::float32) return attention_plain_fwd(device, args);
  if (is_short(args)) return attention_short_fwd(device, args);
  attention_tiled_fwd(device, args);
}

void attention_bwd(Cuda device, const AttentionBackward& args) {
  check_offsets(device, args);
  if (args.dtype == DType::float32) return attention_plain_bwd(device, args);
  if (is_short(args)) return attention_short_bwd(device, args);
  attention_tiled_bwd(device, args);
}

}  // namespace cramfast
