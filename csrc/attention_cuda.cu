// The choice between the CUDA forms of attention.
#include <stdexcept>
#include <string>

#include "attention_forms.h"

namespace cramfast {
namespace {

template <class Args>
void check(const Args& args) {
  if (args.dtype == DType::float32) throw std::invalid_argument("attention: the CUDA kernels take no float32");
  if (args.max_seqlen > 0) {
    throw std::invalid_argument("attention: the CUDA kernels take sequences of up to " +
                                std::to_string(0) + " tokens, not " +
                                std::to_string(args.max_seqlen));
  }
}

}  // namespace

void attention_fwd(Cuda, const AttentionForward& args) {
  check(args);
}

void attention_bwd(Cuda, const AttentionBackward& args) {
  check(args);
}

}  // namespace cramfast
