// The choice between the CUDA forms of attention.
#include <stdexcept>
#include <string>

#include "attention_forms.h"

namespace cramfast {
namespace {

template <class Args>
void check(const Args& args) {
  if (args.dtype != DType::float32 && args.max_seqlen > attention_short_max) {
    throw std::invalid_argument("attention: the CUDA kernels take sequences of up to " +
                                std::to_string(attention_short_max) + " tokens in half precision, not " +
                                std::to_string(args.max_seqlen));
  }
}

}  // namespace

void attention_fwd(Cuda device, const AttentionForward& args) {
  check(args);
  if (args.dtype == DType::float32) return attention_plain_fwd(device, args);
  attention_short_fwd(device, args);
}

void attention_bwd(Cuda device, const AttentionBackward& args) {
  check(args);
  if (args.dtype == DType::float32) return attention_plain_bwd(device, args);
  attention_short_bwd(device, args);
}

}  // namespace cramfast
