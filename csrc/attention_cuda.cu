// The choice between the CUDA forms of attention.
#include <stdexcept>
#include <string>

#include "attention_forms.h"

namespace cramfast {
namespace {

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
  if (args.dtype == DType::float32) return attention_plain_fwd(device, args);
  if (is_short(args)) return attention_short_fwd(device, args);
  attention_tiled_fwd(device, args);
}

void attention_bwd(Cuda device, const AttentionBackward& args) {
  if (args.dtype == DType::float32) return attention_plain_bwd(device, args);
  if (is_short(args)) return attention_short_bwd(device, args);
  attention_tiled_bwd(device, args);
}

}  // namespace cramfast
