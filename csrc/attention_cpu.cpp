// One task is one (sequence, head). It copies its rows of q, k and v into scratch of the thread, turned and in the
// layouts that tile_matmul.h multiplies, then walks blocks of query rows and, inside, blocks of keys: scores stay in
// the L2 cache. Tasks are handed out as threads come free, which cannot change a result because each owns its rows.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "simd.h"
#include "tile_matmul.h"

namespace cramfast::CRAMFAST_ISA {
namespace {

using Size = std::int64_t;

template <class Form>
constexpr Size block_rows = Form::tiles ? 64 : 48;  // queries: a multiple of tile_rows, of two, and of whole tiles
constexpr Size block_keys = 512;
constexpr Size block_stride = block_keys + lanes;  // an odd number of vectors keeps columns in different cache sets
constexpr Size max_head_width = 256;
static_assert(block_rows<Single> % (2 * tile_rows) == 0 && block_keys % panel == 0 && block_stride % lanes == 0);

Size round_up(Size value, Size multiple) { return ceil_div(value, multiple) * multiple; }

struct Head {
  Size first, length, head;  // first token and number of tokens of the sequence, index of the head
};

// Hands out pieces of scratch; with a null base it only counts. Everything in scratch has 4 bytes.
struct alignas(64) CacheLine {
  float values[16];
};
struct Arena {
  CacheLine* base;
  Size used = 0;

  template <class Word>
  Word* take(Size words) {
    Word* piece = base ? reinterpret_cast<Word*>(base + used) : nullptr;
    used += ceil_div(words, 16);
    return piece;
  }
};

// Room for a (rows, n) matrix in both layouts; rows is even.
template <class Form>
Words<typename Form::Word> take_words(Arena& arena, Size rows, Size n) {
  using Word = typename Form::Word;
  Word* along = arena.take<Word>(rows * n / Form::depth);
  Word* across = Form::depth == 1 ? along : arena.take<Word>(rows * n / Form::depth);
  return {along, across, n / Form::depth, n};
}

// The same for a block of float values that a row loop leaves in `values`: words of one float need no copy.
template <class Form>
Words<typename Form::Word> take_block_words(Arena& arena, float* values) {
  if constexpr (Form::depth == 1) {
    return {values, values, block_stride, block_stride};
  } else {
    return take_words<Form>(arena, block_rows<Form>, block_stride);
  }
}

template <class Form>
using LeftOf = Left<typename Form::Word>;
template <class Form>
using RightOf = Right<typename Form::Word>;

// B operands: the transpose of keys [begin, ...) packed by panels, and rows [begin, ...) of a matrix of n columns.
template <class Form>
RightOf<Form> transposed_from(const typename Form::Word* panels, Size begin, Size width) {
  const Size words = width / Form::depth;
  return {panels + begin * words, panel, panel * words};
}
template <class Form>
RightOf<Form> rows_from(const Words<typename Form::Word>& matrix, Size begin) {
  return {matrix.across + begin / Form::depth * matrix.across_stride, matrix.across_stride, panel};
}

// A operands: rows [begin, ...) of a matrix, and the transpose of one.
template <class Form>
LeftOf<Form> left_rows(const Words<typename Form::Word>& matrix, Size begin) {
  return {matrix.along + begin * matrix.along_stride, matrix.along_stride, 1};
}
template <class Form>
LeftOf<Form> left_transposed(const Words<typename Form::Word>& matrix) {
  return {matrix.across, 1, matrix.across_stride};
}

// Turns the pairs (j, j + K / 2) by +p theta_j (direction 1) or -p theta_j (direction -1).
void rotate(float* __restrict x, const float* __restrict cos, const float* __restrict sin, Size width,
            float direction) {
  const Size half = width / 2;
#pragma omp simd
  for (Size j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half], s = direction * sin[j];
    x[j] = a * cos[j] - b * s;
    x[j + half] = b * cos[j] + a * s;
  }
}

// A matrix in memory as the operator got it.
template <class T>
struct Stored {
  T* data;
  Size stride, rows, width;
  const float* cos;  // null: not turned
  const float* sin;

  void load(Size row, float* to) const {
    if (row >= rows) {
      std::fill_n(to, width, 0.0f);
      return;
    }
    load_row(data + row * stride, to, width);
    if (cos) rotate(to, cos + row * width / 2, sin + row * width / 2, width, 1.0f);
  }
};

// q (0), k (1) or v (2) of one head, or its gradient.
template <class T, class Args, class Memory>
Stored<T> projection(const Args& args, Memory* qkv, const Head& head, int which) {
  const Size K = args.head_width, row = 3 * args.heads * K;
  T* data = static_cast<T*>(qkv) + head.first * row + (which * args.heads + head.head) * K;
  return {data, row, head.length, K, which < 2 ? args.cos : nullptr, which < 2 ? args.sin : nullptr};
}

// Rows beyond the last become zeros, up to whole vectors, so that no product meets what scratch held before.
template <class Form, class T>
void load_words(const Stored<const T>& from, const Words<typename Form::Word>& to) {
  const Size rows = round_up(from.rows, std::max<Size>(lanes, Form::summed));
  if constexpr (Form::depth == 1) {
    for (Size row = 0; row < rows; ++row) from.load(row, to.along + row * to.along_stride);
  } else {
    alignas(64) float even[max_head_width], odd[max_head_width];
    for (Size row = 0; row < rows; row += 2) {
      from.load(row, even);
      from.load(row + 1, odd);
      Form::store(to, row, even, odd, from.width);
    }
  }
}

// The keys that some of the queries [begin, end) attend, from a panel boundary on.
struct Range {
  Size begin, end;
};
Range keys_of(Size begin, Size end, Size length, Size window) {
  if (window < 0) return {0, length};
  return {std::max<Size>(0, begin - window) / panel * panel, std::min(length, end + window)};
}

// Minus infinity for keys [begin, begin + n) that query i does not attend, the padding to whole vectors among them.
// Returns whether any is left.
bool mask_row(float* scores, Size i, Size begin, Size n, Size length, Size window) {
  const Size first = window < 0 ? 0 : std::clamp<Size>(i - window - begin, 0, n);
  const Size last = std::clamp<Size>((window < 0 ? length : std::min(length, i + window + 1)) - begin, 0, n);
  constexpr float none = -std::numeric_limits<float>::infinity();
  std::fill(scores, scores + std::min(first, last), none);
  std::fill(scores + last, scores + n, none);
  return first < last;
}

// Columns of a block of scores come in so many, and the words of a summed dimension of n values are so many.
template <class Form>
constexpr Size padded = Form::summed > lanes ? Form::summed : lanes;
template <class Form>
constexpr Size words_of(Size n) {
  return round_up(n, Form::summed) / Form::depth;
}

template <class Form>
struct ForwardScratch {
  Words<typename Form::Word> q, k, v, p;
  typename Form::Word* k_transposed;
  float *scores, *out, *largest, *sum;

  ForwardScratch(Arena& arena, Size longest, Size width) {
    const Size rows = round_up(longest, panel);
    q = take_words<Form>(arena, rows, width);
    k = take_words<Form>(arena, rows, width);
    v = take_words<Form>(arena, rows, width);
    k_transposed = arena.take<typename Form::Word>(rows * width / Form::depth);
    scores = arena.take<float>(block_rows<Form> * block_stride);
    out = arena.take<float>(block_rows<Form> * width);
    largest = arena.take<float>(block_rows<Form>);
    sum = arena.take<float>(block_rows<Form>);
    p = take_block_words<Form>(arena, scores);
  }
};

// Scores of one row -> exp(scale (score - largest)); the row of `out` and its sum follow a new largest score.
void softmax_row(float* __restrict scores, Size n, float scale, float& largest, float& sum, float* __restrict out,
                 Size width) {
  float highest = largest;
#pragma omp simd reduction(max : highest)
  for (Size j = 0; j < n; ++j) highest = scores[j] > highest ? scores[j] : highest;
  const float faded = exp_(scale * (largest - highest));
  LaneSum<lanes> total;
  for_lanes<lanes>(n, [&](Size j, int lane) {
    scores[j] = exp_(scale * (scores[j] - highest));
    total.of[lane] += scores[j];
  });
  if (faded != 1.0f) {
    for (Size j = 0; j < width; ++j) out[j] *= faded;
  }
  sum = sum * faded + total.total();
  largest = highest;
}

template <class Form>
void forward_keys(ForwardScratch<Form>& scratch, Range queries, Range keys, Size length, Size width, Size window,
                  float scale) {
  const Size rows = queries.end - queries.begin, n = round_up(keys.end - keys.begin, padded<Form>);
  multiply<Form>(rows, n, width / Form::depth, left_rows<Form>(scratch.q, queries.begin),
                 transposed_from<Form>(scratch.k_transposed, keys.begin, width), scratch.scores, block_stride, false);
  for (Size r = 0; r < rows; ++r) {
    float* scores = scratch.scores + r * block_stride;
    if (mask_row(scores, queries.begin + r, keys.begin, n, length, window)) {
      softmax_row(scores, n / lanes * lanes, scale, scratch.largest[r], scratch.sum[r], scratch.out + r * width, width);
    } else {
      std::fill_n(scores, n, 0.0f);
    }
    if constexpr (Form::depth == 2) {
      const float* even = scratch.scores + r / 2 * 2 * block_stride;  // past the last row lies one that nobody reads
      if (r % 2 == 1 || r + 1 == rows) Form::store(scratch.p, r / 2 * 2, even, even + block_stride, n);
    }
  }
  multiply<Form>(rows, width, words_of<Form>(keys.end - keys.begin), left_rows<Form>(scratch.p, 0),
                 rows_from<Form>(scratch.v, keys.begin), scratch.out, width, true);
}

template <class T>
void forward_head(const AttentionForward& args, const Head& head, CacheLine* memory, Size longest) {
  using Form = typename FormOf<T>::type;
  const Size K = args.head_width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(K));
  Arena arena{memory};
  ForwardScratch<Form> scratch(arena, longest, K);
  load_words<Form>(projection<const T>(args, args.qkv, head, 0), scratch.q);
  load_words<Form>(projection<const T>(args, args.qkv, head, 1), scratch.k);
  load_words<Form>(projection<const T>(args, args.qkv, head, 2), scratch.v);
  transpose_words<Form>(scratch.k.along, round_up(head.length, padded<Form>), K / Form::depth, scratch.k_transposed);
  for (Size begin = 0; begin < head.length; begin += block_rows<Form>) {
    const Range queries{begin, std::min(head.length, begin + block_rows<Form>)};
    const Range keys = keys_of(queries.begin, queries.end, head.length, args.window);
    const Size rows = queries.end - begin;
    std::fill_n(scratch.out, rows * K, 0.0f);
    std::fill_n(scratch.largest, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sum, rows, 0.0f);
    for (Size key = keys.begin; key < keys.end; key += block_keys) {
      forward_keys(scratch, queries, {key, std::min(keys.end, key + block_keys)}, head.length, K, args.window, scale);
    }
    for (Size r = 0; r < rows; ++r) {
      const Size token = head.first + begin + r;
      const float share = 1.0f / scratch.sum[r];
      float* row = scratch.out + r * K;
      for (Size d = 0; d < K; ++d) row[d] *= share;
      store_row(row, static_cast<T*>(args.out) + (token * args.heads + head.head) * K, K);
      args.lse[head.head * args.tokens + token] = scale * scratch.largest[r] + std::log(scratch.sum[r]);
    }
  }
}

template <class Form>
struct BackwardScratch {
  Words<typename Form::Word> q, k, v, dout, p, dz;
  typename Form::Word *k_transposed, *v_transposed;
  float *scores, *dp, *dq, *dk, *dv;
  // Of Tiles: (width, rows) of words and of float32, with this stride in values.
  Size transposed_stride = 0;
  typename Form::Word *q_transposed = nullptr, *dout_transposed = nullptr;
  float *dk_transposed = nullptr, *dv_transposed = nullptr;

  BackwardScratch(Arena& arena, Size longest, Size width) {
    const Size rows = round_up(longest, panel);
    q = take_words<Form>(arena, rows, width);
    k = take_words<Form>(arena, rows, width);
    v = take_words<Form>(arena, rows, width);
    dout = take_words<Form>(arena, rows, width);
    k_transposed = arena.take<typename Form::Word>(rows * width / Form::depth);
    v_transposed = arena.take<typename Form::Word>(rows * width / Form::depth);
    scores = arena.take<float>(block_rows<Form> * block_stride);
    dp = arena.take<float>(block_rows<Form> * block_stride);
    p = take_block_words<Form>(arena, scores);
    dz = take_block_words<Form>(arena, dp);
    dq = arena.take<float>(block_rows<Form> * width);
    dk = arena.take<float>(rows * width);
    dv = arena.take<float>(rows * width);
    if constexpr (Form::tiles) {
      transposed_stride = rows + 2 * lanes;  // an odd number of vectors, as in block_stride
      q_transposed = arena.take<typename Form::Word>(width * transposed_stride / 2);
      dout_transposed = arena.take<typename Form::Word>(width * transposed_stride / 2);
      dk_transposed = arena.take<float>(width * transposed_stride);
      dv_transposed = arena.take<float>(width * transposed_stride);
    }
  }
};

// One row of a block of keys: scores -> P in place, dP -> dz / scale in place. When the block holds every key of the
// row (`whole`), P is normalised anew and delta is sum_j P_ij dP_ij: with lse and do_i o_i, each rounded on its own, dz
// of a row with few keys would be the difference of two nearly equal numbers.
void gradient_row(float* __restrict scores, float* __restrict dp, Size n, float scale, float lse, float delta,
                  bool whole) {
  LaneSum<lanes> total, weighted;
  for_lanes<lanes>(n, [&](Size j, int lane) {
    scores[j] = exp_(scale * scores[j] - lse);
    total.of[lane] += scores[j];
    weighted.of[lane] += scores[j] * dp[j];
  });
  const float share = whole ? 1.0f / total.total() : 1.0f;
  const float mean = whole ? weighted.total() * share : delta;
#pragma omp simd
  for (Size j = 0; j < n; ++j) {
    scores[j] *= share;
    dp[j] = scores[j] * (dp[j] - mean);
  }
}

template <class T>
float dot_row(const T* __restrict a, const T* __restrict b, Size n) {
  LaneSum<lanes> sum;
  for_lanes<lanes>(n, [&](Size i, int lane) { sum.of[lane] += widen(a[i]) * widen(b[i]); });
  return sum.total();
}

template <class Form>
void backward_keys(BackwardScratch<Form>& scratch, Range queries, Range keys, Size length, Size width, Size window,
                   const float* lse, const float* delta, bool whole) {
  const Size rows = queries.end - queries.begin, columns = keys.end - keys.begin, n = round_up(columns, padded<Form>);
  const Size words = width / Form::depth, row_words = words_of<Form>(rows);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  multiply<Form>(rows, n, words, left_rows<Form>(scratch.q, queries.begin),
                 transposed_from<Form>(scratch.k_transposed, keys.begin, width), scratch.scores, block_stride, false);
  multiply<Form>(rows, n, words, left_rows<Form>(scratch.dout, queries.begin),
                 transposed_from<Form>(scratch.v_transposed, keys.begin, width), scratch.dp, block_stride, false);
  for (Size r = 0; r < round_up(rows, Form::summed); ++r) {
    float* scores = scratch.scores + r * block_stride;
    float* dp = scratch.dp + r * block_stride;
    if (r < rows) {
      mask_row(scores, queries.begin + r, keys.begin, n, length, window);
      gradient_row(scores, dp, n / lanes * lanes, scale, lse[r], delta[r], whole);
    } else {
      std::fill_n(scores, n, 0.0f);
      std::fill_n(dp, n, 0.0f);
    }
    if constexpr (Form::depth == 2) {
      if (r % 2 == 0) continue;
      Form::store(scratch.p, r - 1, scores - block_stride, scores, n);
      Form::store(scratch.dz, r - 1, dp - block_stride, dp, n);
    }
  }
  multiply<Form>(rows, width, words_of<Form>(columns), left_rows<Form>(scratch.dz, 0),
                 rows_from<Form>(scratch.k, keys.begin), scratch.dq, width, true);
  if constexpr (Form::tiles) {  // dv^T = dout^T P: rows of P are words of B as they lie, and dout was transposed once
    const Size from = queries.begin / Form::depth, stride = scratch.transposed_stride;
    multiply<Form>(width, n, row_words, {scratch.dout_transposed + from, stride / 2, 1}, rows_from<Form>(scratch.p, 0),
                   scratch.dv_transposed + keys.begin, stride, true);
    multiply<Form>(width, n, row_words, {scratch.q_transposed + from, stride / 2, 1}, rows_from<Form>(scratch.dz, 0),
                   scratch.dk_transposed + keys.begin, stride, true);
  } else {
    multiply<Form>(columns, width, row_words, left_transposed<Form>(scratch.p),
                   rows_from<Form>(scratch.dout, queries.begin), scratch.dv + keys.begin * width, width, true);
    multiply<Form>(columns, width, row_words, left_transposed<Form>(scratch.dz),
                   rows_from<Form>(scratch.q, queries.begin), scratch.dk + keys.begin * width, width, true);
  }
}

// Gradients of rows [begin, end) of one of q, k, v: scaled, turned back and rounded.
template <class T>
void store_gradient(float* from, const Stored<T>& to, Size begin, Size end, float scale) {
  for (Size row = begin; row < end; ++row, from += to.width) {
    for (Size d = 0; d < to.width; ++d) from[d] *= scale;
    if (to.cos) rotate(from, to.cos + row * to.width / 2, to.sin + row * to.width / 2, to.width, -1.0f);
    store_row(from, to.data + row * to.stride, to.width);
  }
}

template <class T>
void backward_head(const AttentionBackward& args, const Head& head, CacheLine* memory, Size longest) {
  using Form = typename FormOf<T>::type;
  const Size K = args.head_width, length = head.length, out_stride = args.heads * K;
  const float scale = 1.0f / std::sqrt(static_cast<float>(K));
  const Size out_start = head.first * out_stride + head.head * K;
  const T* out = static_cast<const T*>(args.out) + out_start;
  const T* dout = static_cast<const T*>(args.dout) + out_start;
  const float* lse = args.lse + head.head * args.tokens + head.first;
  Arena arena{memory};
  BackwardScratch<Form> scratch(arena, longest, K);
  load_words<Form>(projection<const T>(args, args.qkv, head, 0), scratch.q);
  load_words<Form>(projection<const T>(args, args.qkv, head, 1), scratch.k);
  load_words<Form>(projection<const T>(args, args.qkv, head, 2), scratch.v);
  load_words<Form>(Stored<const T>{dout, out_stride, length, K, nullptr, nullptr}, scratch.dout);
  transpose_words<Form>(scratch.k.along, round_up(length, padded<Form>), K / Form::depth, scratch.k_transposed);
  transpose_words<Form>(scratch.v.along, round_up(length, padded<Form>), K / Form::depth, scratch.v_transposed);
  const Size stride = scratch.transposed_stride;
  if constexpr (Form::tiles) {
    const Size rows = round_up(length, Form::summed) / Form::depth;
    for (const auto& [from, to] : {std::pair(scratch.q, scratch.q_transposed), {scratch.dout, scratch.dout_transposed}}) {
      transpose<WordVector>(from.across, from.across_stride, rows, K, to, stride / 2);
    }
    std::fill_n(scratch.dk_transposed, K * stride, 0.0f);
    std::fill_n(scratch.dv_transposed, K * stride, 0.0f);
  } else {
    std::fill_n(scratch.dk, length * K, 0.0f);
    std::fill_n(scratch.dv, length * K, 0.0f);
  }
  const auto dq = projection<T>(args, args.dqkv, head, 0);
  for (Size begin = 0; begin < length; begin += block_rows<Form>) {
    const Range queries{begin, std::min(length, begin + block_rows<Form>)};
    const Range keys = keys_of(queries.begin, queries.end, length, args.window);
    const bool whole = keys.end - keys.begin <= block_keys;
    float delta[block_rows<Form>] = {};
    for (Size i = begin; i < queries.end && !whole; ++i) {
      delta[i - begin] = dot_row(dout + i * out_stride, out + i * out_stride, K);
    }
    std::fill_n(scratch.dq, (queries.end - begin) * K, 0.0f);
    for (Size key = keys.begin; key < keys.end; key += block_keys) {
      const Range some{key, std::min(keys.end, key + block_keys)};
      backward_keys(scratch, queries, some, length, K, args.window, lse + begin, delta, whole);
    }
    store_gradient(scratch.dq, dq, begin, queries.end, scale);
  }
  if constexpr (Form::tiles) {
    transpose<FloatVector>(scratch.dk_transposed, stride, K, length, scratch.dk, K);
    transpose<FloatVector>(scratch.dv_transposed, stride, K, length, scratch.dv, K);
  }
  store_gradient(scratch.dk, projection<T>(args, args.dqkv, head, 1), 0, length, scale);
  store_gradient(scratch.dv, projection<T>(args, args.dqkv, head, 2), 0, length, 1.0f);
}

// f(task, scratch of the thread) for every sequence that has tokens and every head.
template <class Args, class F>
void for_each_head(Cpu device, const Args& args, Size scratch_lines, const F& f) {
  const std::unique_ptr<CacheLine[]> scratch(new CacheLine[device.threads * scratch_lines]);
  std::atomic<Size> next{0};
  parallel_for(device, device.threads, [&](Size thread) {
    const TileConfiguration configuration;
    const Size tasks = args.sequences * args.heads;
    for (Size task = next++; task < tasks; task = next++) {
      const std::int32_t* bounds = args.cu_seqlens + task / args.heads;
      const Head head{bounds[0], bounds[1] - bounds[0], task % args.heads};
      if (head.length > 0) f(head, scratch.get() + thread * scratch_lines);
    }
  });
}

Size longest_sequence(const std::int32_t* cu_seqlens, Size sequences) {
  Size longest = 0;
  for (Size s = 0; s < sequences; ++s) longest = std::max<Size>(longest, cu_seqlens[s + 1] - cu_seqlens[s]);
  return longest;
}

}  // namespace

void attention_fwd(Cpu device, const AttentionForward& args) {
  const Size longest = longest_sequence(args.cu_seqlens, args.sequences);
  const Size used = args.cu_seqlens[args.sequences], width = args.heads * args.head_width;
  with_dtype(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    Arena count{nullptr};
    ForwardScratch<typename FormOf<T>::type>(count, longest, args.head_width);
    for_each_head(device, args, count.used, [&](const Head& head, CacheLine* memory) {
      forward_head<T>(args, head, memory, longest);
    });
    std::fill_n(static_cast<T*>(args.out) + used * width, (args.tokens - used) * width, T{});
  });
  for (Size h = 0; h < args.heads; ++h) std::fill_n(args.lse + h * args.tokens + used, args.tokens - used, 0.0f);
}

void attention_bwd(Cpu device, const AttentionBackward& args) {
  const Size longest = longest_sequence(args.cu_seqlens, args.sequences);
  const Size used = args.cu_seqlens[args.sequences], width = 3 * args.heads * args.head_width;
  with_dtype(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    Arena count{nullptr};
    BackwardScratch<typename FormOf<T>::type>(count, longest, args.head_width);
    for_each_head(device, args, count.used, [&](const Head& head, CacheLine* memory) {
      backward_head<T>(args, head, memory, longest);
    });
    std::fill_n(static_cast<T*>(args.dqkv) + used * width, (args.tokens - used) * width, T{});
  });
}

}  // namespace cramfast::CRAMFAST_ISA
