#include <type_traits>

#include "attention_device.h"
#include "attention_forms.h"

// Attention in float32, which the tensor cores of these cards do not multiply: to compare with, not to train with. A
// block walks over the rows of one sequence and head, a warp over the keys (or queries) of one row; lanes share out the
// width. Backward a first kernel writes dq and the mean of each row, a second one dk and dv.

namespace cramfast {
namespace {

constexpr int threads = 256;

// One row of `width` values over a warp: lane l holds the pairs (j, j + width / 2) with j = l, l + 32, ...
template <int width>
struct Row {
  static constexpr int half = width / 2, pairs = half > 32 ? half / 32 : 1;
  float low[pairs], high[pairs];

  DEVICE static bool holds(int pair) { return lane_id() + 32 * pair < half; }

  DEVICE void load(const Rows<const float>& rows, int row, const Rotary& rotary) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int j = lane_id() + 32 * i;
      low[i] = holds(i) ? rows.data[row * rows.stride + j] : 0.0f;
      high[i] = holds(i) ? rows.data[row * rows.stride + j + half] : 0.0f;
      if (rotary.cos && holds(i)) turn(low[i], high[i], rotary.cos[row * half + j], rotary.sin[row * half + j]);
    }
  }
  DEVICE void store(const Rows<float>& rows, int row, const Rotary& rotary, float factor) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      if (!holds(i)) continue;
      const int j = lane_id() + 32 * i;
      if (rotary.cos) turn(low[i], high[i], rotary.cos[row * half + j], -rotary.sin[row * half + j]);
      rows.data[row * rows.stride + j] = low[i] * factor;
      rows.data[row * rows.stride + j + half] = high[i] * factor;
    }
  }
  // this = factor this + weight other.
  DEVICE void add(float weight, const Row& other, float factor = 1.0f) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      low[i] = factor * low[i] + weight * other.low[i];
      high[i] = factor * high[i] + weight * other.high[i];
    }
  }
};

template <int width>
DEVICE float dot(const Row<width>& a, const Row<width>& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Row<width>::pairs; ++i) sum += a.low[i] * b.low[i] + a.high[i] * b.high[i];
  return warp_sum(sum);
}

// The sequence and head of this block, from its first row on; of no rows where there is none.
template <class Args>
DEVICE Place find_place(const Args& args) {
  Place place{};
  if (!find_sequence(args, blockIdx.x / args.heads, place)) return {};
  place.head = static_cast<int>(blockIdx.x % args.heads);
  return place;
}

// Rows of that place by their position, and where its statistics (log-sum-exp, delta) start.
template <int width, class Args>
struct Head {
  const Args& args;
  const Place at = find_place(args);
  const Rotary rotary{args.cos, args.sin}, none{nullptr, nullptr};
  const std::int64_t statistics = at.head * args.tokens + at.first_token;

  DEVICE Row<width> projection(int which, int row) const {
    Row<width> values;
    values.load(projection_rows(args, static_cast<const float*>(args.qkv), which, at), row, which < 2 ? rotary : none);
    return values;
  }
  DEVICE Row<width> dout(int row) const {
    Row<width> values;
    values.load(output_rows(args, static_cast<const float*>(args.dout), at), row, none);
    return values;
  }
  DEVICE void store_gradient(int which, int row, Row<width>& values) const {
    values.store(projection_rows(args, static_cast<float*>(args.dqkv), which, at), row, which < 2 ? rotary : none,
                 which < 2 ? score_scale<width> : 1.0f);
  }
  // f(row) for the rows of this warp.
  template <class F>
  DEVICE void each_row(const F& f) const {
    for (int row = warp_id(); row < at.length; row += threads / 32) f(row);
  }
  // f(other) for the rows that attend this one, and that it attends.
  template <class F>
  DEVICE void each_other(int row, const F& f) const {
    const Span others = attended(row, at.length, args.window);
    for (int other = others.first; other < others.last; ++other) f(other);
  }
};

template <int width>
__global__ void __launch_bounds__(threads) attention_plain_fwd_kernel(AttentionForward args) {
  clear_tail<float>(args);
  const Head<width, AttentionForward> head{args};
  head.each_row([&](int i) {
    const Row<width> q = head.projection(0, i);
    Row<width> out = {};
    float largest = -INFINITY, sum = 0.0f;
    head.each_other(i, [&](int j) {
      const float score = score_scale<width> * dot(q, head.projection(1, j)), highest = fmaxf(largest, score);
      const float faded = expf(largest - highest), p = expf(score - highest);
      out.add(p, head.projection(2, j), faded);
      sum = sum * faded + p;
      largest = highest;
    });
    out.store(output_rows(args, static_cast<float*>(args.out), head.at), i, head.none, 1.0f / sum);
    if (lane_id() == 0) args.lse[head.statistics + i] = largest + logf(sum);
  });
}

// P and dP of one query and key.
struct Weight {
  float p, dp;
};
template <int width>
DEVICE Weight weigh(const Row<width>& q, const Row<width>& dout, const Row<width>& k, const Row<width>& v, float lse) {
  return {expf(score_scale<width> * dot(q, k) - lse), dot(dout, v)};
}

// dq, and delta_i = sum_j P dP / sum_j P.
template <int width>
__global__ void __launch_bounds__(threads) attention_plain_bwd_dq_kernel(AttentionBackward args) {
  clear_tail<float>(args);
  const Head<width, AttentionBackward> head{args};
  head.each_row([&](int i) {
    const Row<width> q = head.projection(0, i), dout = head.dout(i);
    const float lse = args.lse[head.statistics + i];
    float sum = 0.0f, weighted = 0.0f;
    head.each_other(i, [&](int j) {
      const Weight w = weigh(q, dout, head.projection(1, j), head.projection(2, j), lse);
      sum += w.p;
      weighted += w.p * w.dp;
    });
    const float mean = weighted / sum;
    Row<width> dq = {};
    head.each_other(i, [&](int j) {
      const Row<width> k = head.projection(1, j);
      const Weight w = weigh(q, dout, k, head.projection(2, j), lse);
      dq.add(w.p * (w.dp - mean), k);
    });
    head.store_gradient(0, i, dq);
    if (lane_id() == 0) args.delta[head.statistics + i] = mean;
  });
}

template <int width>
__global__ void __launch_bounds__(threads) attention_plain_bwd_dkdv_kernel(AttentionBackward args) {
  const Head<width, AttentionBackward> head{args};
  head.each_row([&](int j) {
    const Row<width> k = head.projection(1, j), v = head.projection(2, j);
    Row<width> dk = {}, dv = {};
    head.each_other(j, [&](int i) {
      const Row<width> q = head.projection(0, i), dout = head.dout(i);
      const Weight w = weigh(q, dout, k, v, args.lse[head.statistics + i]);
      dv.add(w.p, dout);
      dk.add(w.p * (w.dp - args.delta[head.statistics + i]), q);
    });
    head.store_gradient(1, j, dk);
    head.store_gradient(2, j, dv);
  });
}

template <class Args>
unsigned blocks_for(const Args& args) {
  const std::int64_t blocks = args.sequences * args.heads;
  return static_cast<unsigned>(blocks > 0 ? blocks : 1);  // one at least, for the tail
}

}  // namespace

void attention_plain_fwd(Cuda device, const AttentionForward& args) {
  with_head_width(args.head_width, [&](auto head_width) {
    constexpr int width = decltype(head_width)::value;
    launch("attention_plain_fwd", attention_plain_fwd_kernel<width>, device, blocks_for(args), threads, 0, args);
  });
}

void attention_plain_bwd(Cuda device, const AttentionBackward& args) {
  with_head_width(args.head_width, [&](auto head_width) {
    constexpr int width = decltype(head_width)::value;
    const unsigned blocks = blocks_for(args);
    launch("attention_plain_bwd_dq", attention_plain_bwd_dq_kernel<width>, device, blocks, threads, 0, args);
    launch("attention_plain_bwd_dkdv", attention_plain_bwd_dkdv_kernel<width>, device, blocks, threads, 0, args);
  });
}

}  // namespace cramfast
