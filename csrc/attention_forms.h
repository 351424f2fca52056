// The CUDA forms of attention behind attention_fwd(Cuda, ...) and attention_bwd(Cuda, ...), which choose one by dtype
// and max_seqlen. The short and the tiled form take float16 and, from sm_80 on, bfloat16; the plain one takes float32.
// All take head widths 32, 64 and 128 and any window; read lengths on the device only, and launch grids that depend on
// sizes alone, so that a CUDA graph can hold them; zero the rows past the last offset. A kernel before each stops
// with an error where the offsets do not start at 0, decrease, pass the tokens or leave a sequence too long.
#pragma once

#include "attention.h"

namespace cramfast {

// The short form holds all keys and values of a sequence and head on chip: no online softmax.
constexpr std::int64_t attention_short_max = 128;

void attention_short_fwd(Cuda device, const AttentionForward& args);
void attention_short_bwd(Cuda device, const AttentionBackward& args);

// The tiled form walks over blocks of keys with an online softmax; backward it writes and reads `delta`.
constexpr std::int64_t attention_tiled_max = 8192;

void attention_tiled_fwd(Cuda device, const AttentionForward& args);
void attention_tiled_bwd(Cuda device, const AttentionBackward& args);

// Loops over keys in float32; backward it writes and reads `delta`.
void attention_plain_fwd(Cuda device, const AttentionForward& args);
void attention_plain_bwd(Cuda device, const AttentionBackward& args);

}  // namespace cramfast
