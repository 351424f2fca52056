#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "attention_device.h"
#include "attention_forms.h"

// A block of eight warps serves one sequence: one head of more than 64 tokens, or as many heads of a shorter sequence
// as give each warp a tile of 16 rows, so that 16 tokens cost one warp and not eight. Sequences of every length share
// one launch. Keys and values of a head are on chip as a whole: no online softmax, and the backward pass sees all of a
// row of dP before it needs the row's mean, so that it reads no output and subtracts no rounded number.
//
// The warp of a tile owns its rows as queries: scores never leave it. Backward it owns them as keys too, and P and dz
// change hands through shared memory where k and v lay. Nothing is computed twice, nothing is added in two places.
//
//   forward    z = q k^T, P = softmax(z), out = P v                                q in registers; k, v shared
//   backward   z = q k^T, P;  dP = dout v^T, dz = P (dP - sum P dP);  dq = dz k    q, dout, k, v shared
//              dv = P^T dout                                                       P, dout shared
//              dk = dz^T q                                                         dz, q shared
// At head width 128 only two of the matrices fit (64 KiB on Turing): there q and dout come through registers first, and
// into shared memory, from the L2 cache as a rule, when k and v have gone.

namespace cramfast {
namespace {

constexpr int warps = 8, threads = 32 * warps, block_rows = warps * tile_rows;
static_assert(block_rows == attention_short_max);

using Scores = float[warps][2][4];         // accumulators of 16 queries against every tile of keys
using Operands = std::uint32_t[warps][4];  // the same, rounded

// bfloat16 needs the tensor cores of sm_80.
template <class T>
constexpr bool can_run = has_sm80 || !std::is_same_v<T, bf16>;

// ---- whose rows a warp works on

struct Tile : Place {
  int head_row;  // row of the head's first token in the shared matrices
  Span others;   // tiles of keys that its queries attend; of queries that attend its keys too: windows are symmetric

  DEVICE int row() const { return head_row + position; }
};

// Whether this warp has one. blocks_each: blocks for one sequence.
template <class Args>
DEVICE bool find_tile(const Args& args, int blocks_each, Tile& tile) {
  const std::int64_t sequence = blockIdx.x / blocks_each;
  if (sequence >= args.sequences) return false;
  tile.first_token = args.cu_seqlens[sequence];
  tile.length = args.cu_seqlens[sequence + 1] - tile.first_token;
  if (tile.length <= 0) return false;
  if (tile.length > block_rows) stop("attention: a sequence is longer than max_seqlen");
  const int tiles = (tile.length + tile_rows - 1) / tile_rows, heads = warps / tiles, slot = warp_id() / tiles;
  tile.head = static_cast<int>(blockIdx.x % blocks_each) * heads + slot;
  if (slot >= heads || tile.head >= args.heads) return false;
  tile.head_row = slot * tiles * tile_rows;
  tile.position = warp_id() * tile_rows - tile.head_row;
  const int end = tile.position + tile_rows < tile.length ? tile.position + tile_rows : tile.length;
  tile.others.first = attended(tile.position, tile.length, args.window).first / tile_rows;
  tile.others.last = (attended(end - 1, tile.length, args.window).last + tile_rows - 1) / tile_rows;
  return true;
}

// f(t, row of tile t in the shared matrices) for the others. Unrolled: arrays of registers want constant indices.
template <class F>
DEVICE void each_other(const Tile& tile, const F& f) {
#pragma unroll
  for (int t = 0; t < warps; ++t) {
    if (t >= tile.others.first && t < tile.others.last) f(t, tile.head_row + t * tile_rows);
  }
}

// f(score, half, key) for the eight of this lane in tile t; half: of the lane's two rows, 0 is g and 1 is g + 8.
template <class F>
DEVICE void each_score(float (&z)[2][4], int t, const F& f) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    f(z[i / 4][i % 4], i % 4 / 2, t * tile_rows + 8 * (i / 4) + lane_id() % 4 * 2 + i % 2);
  }
}

// The keys that the queries of this lane's two rows attend.
struct Keys {
  Span of[2];

  DEVICE Keys(const Tile& tile, std::int64_t window) {
    of[0] = attended(tile.position + lane_id() / 4, tile.length, window);
    of[1] = attended(tile.position + lane_id() / 4 + 8, tile.length, window);
  }
  DEVICE bool attends(int half, int key) const { return key >= of[half].first && key < of[half].last; }
};

// ---- forward

// z -> exp2(scale z - largest) in place, 0 for keys that are not attended; largest (scaled) and sum of both rows.
DEVICE void softmax(Scores& z, const Tile& tile, const Keys& keys, float scale, float (&largest)[2], float (&sum)[2]) {
  largest[0] = largest[1] = -INFINITY;
  each_other(tile, [&](int t, int) {
    each_score(z[t], t, [&](float& score, int half, int key) {
      if (!keys.attends(half, key)) score = -INFINITY;
      largest[half] = fmaxf(largest[half], score);
    });
  });
  for (float& top : largest) top = quad_max(top) * scale;
  sum[0] = sum[1] = 0.0f;
  each_other(tile, [&](int t, int) {
    each_score(z[t], t, [&](float& score, int half, int) {
      score = exp2_approx(score * scale - largest[half]);
      sum[half] += score;
    });
  });
  for (float& total : sum) total = quad_sum(total);
}

template <int width>
constexpr int forward_bytes = 2 * block_rows * width * 2;

template <class T, int width>
__global__ void __launch_bounds__(threads, 2) attention_short_fwd_kernel(AttentionForward args, int blocks_each) {
  if constexpr (can_run<T>) {
    clear_tail<T>(args);
    Tile tile;
    if (!find_tile(args, blocks_each, tile)) return;
    const Matrix<T, width> k{dynamic_shared<T>()}, v{k.data + block_rows * width};
    const Rotary rotary{args.cos, args.sin};
    const auto rows = [&](int which) { return projection_rows(args, static_cast<const T*>(args.qkv), which, tile); };
    std::uint32_t q[width / 16][4];
    load_operands(q, rows(0));
    load_tile(v, tile.row(), rows(2));
    load_turned_tiles<1>({k}, tile.row(), {rows(1)}, rotary);
    cp_async_commit();
    arrange_operands(q);
    turn_operands(q, rows(0), rotary);
    cp_async_wait<0>();
    __syncthreads();

    Scores z = {};
    each_other(tile, [&](int t, int row) { multiply_transposed(z[t], q, k, row); });
    float largest[2], sum[2], out[width / 8][4] = {};
    softmax(z, tile, Keys(tile, args.window), log2_e * score_scale<width>, largest, sum);
    each_other(tile, [&](int t, int row) {
      std::uint32_t p[4];
      round_to_operand<T>(p, z[t]);
      multiply(out, p, v, row);
    });
    for (int half = 0; half < 2; ++half) {
      const int row = tile.position + lane_id() / 4 + 8 * half;
      scale_row(out, half, 1.0f / sum[half]);
      if (lane_id() % 4 == 0 && row < tile.length) {
        args.lse[tile.head * args.tokens + tile.first_token + row] = ln_2 * largest[half] + logf(sum[half]);
      }
    }
    store_tile(output_rows(args, static_cast<T*>(args.out), tile), out);
  } else {
    stop("attention: bfloat16 needs sm_80 or later");
  }
}

// ---- backward

// Where matrices lie in shared memory, in values.
template <int width>
struct Layout {
  static constexpr bool all_fit = width < 128;  // q and dout beside k and v
  static constexpr int matrix = block_rows * width, exchanged = block_rows * block_rows;
  static constexpr int q = 0, dout = all_fit ? matrix : 0, k = all_fit ? 2 * matrix : 0, v = k + matrix;
  static constexpr int exchange = all_fit ? k : v;  // P, then dz
  static constexpr int end = v + matrix > exchange + exchanged ? v + matrix : exchange + exchanged;
  static constexpr int bytes = end * 2;
  static_assert(bytes <= 64 << 10, "a block of sm_75 has no more");
};

// P of the tile, from the log-sum-exp of the forward pass.
template <class T, int width>
DEVICE void probabilities(Operands& p, const std::uint32_t (&q)[width / 16][4], const Matrix<T, width>& k,
                          const Tile& tile, const AttentionBackward& args) {
  const Keys keys(tile, args.window);
  float lse[2];
  for (int half = 0; half < 2; ++half) {
    const int row = tile.position + lane_id() / 4 + 8 * half;
    lse[half] = row < tile.length ? log2_e * args.lse[tile.head * args.tokens + tile.first_token + row] : INFINITY;
  }
  each_other(tile, [&](int t, int row) {
    float z[2][4] = {};
    multiply_transposed(z, q, k, row);
    each_score(z, t, [&](float& score, int half, int key) {
      const float power = exp2_approx(score * (log2_e * score_scale<width>) - lse[half]);
      score = keys.attends(half, key) ? power : 0.0f;
    });
    round_to_operand<T>(p[t], z);
  });
}

// dz = P (dP - mean), mean = sum P dP / sum P over the row. P is the rounded one that dv is made of, so that dz sums to
// zero over a row whatever rounding did to P.
template <class T>
DEVICE void softmax_gradient(Operands& dz, const Operands& p, const Scores& dp, const Tile& tile) {
  float sum[2] = {}, mean[2] = {};
  each_other(tile, [&](int t, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(p[t][i]);
      const float* slope = &dp[t][i / 2][i % 2 * 2];
      sum[i % 2] += pair.x + pair.y;
      mean[i % 2] += pair.x * slope[0] + pair.y * slope[1];
    }
  });
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]), weighted = quad_sum(mean[half]);
    mean[half] = total > 0.0f ? weighted / total : 0.0f;  // a missing row has no P
  }
  each_other(tile, [&](int t, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(p[t][i]);
      const float* slope = &dp[t][i / 2][i % 2 * 2];
      dz[t][i] = pack2<T>(pair.x * (slope[0] - mean[i % 2]), pair.y * (slope[1] - mean[i % 2]));
    }
  });
}

// The tile's rows of P or dz, for the warps that own the keys.
template <class T>
DEVICE void put(const Matrix<T, block_rows>& exchange, const Operands& values, const Tile& tile) {
  each_other(tile, [&](int t, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile.row() + lane_id() / 4 + 8 * (i % 2), column = t * tile_rows + 8 * (i / 2);
      shared_cast<std::uint32_t>(exchange.chunk(row, column) + lane_id() % 4 * 2)[0] = values[t][i];
    }
  });
}

// acc += the tile's columns of P or dz, transposed, times the rows of all queries.
template <class T, int width>
DEVICE void sum_over_queries(float (&acc)[width / 8][4], const Matrix<T, block_rows>& exchange,
                             const Matrix<T, width>& queries, const Tile& tile) {
#pragma unroll 1
  for (int t = tile.others.first; t < tile.others.last; ++t) {
    std::uint32_t a[4];
    exchange.a_transposed(a, tile.head_row + t * tile_rows, tile.position);
    multiply(acc, a, queries, tile.head_row + t * tile_rows);
  }
}

template <class T, int width>
DEVICE void store_gradient(const AttentionBackward& args, int which, const Tile& tile, float (&acc)[width / 8][4]) {
  const Rows<T> rows = projection_rows(args, static_cast<T*>(args.dqkv), which, tile);
  if (which < 2) {
    for (int half = 0; half < 2; ++half) scale_row(acc, half, score_scale<width>);
    turn_back(acc, rows, Rotary{args.cos, args.sin});
  }
  store_tile(rows, acc);
}

// Everything that needs k and v: P and dz of the tile, and its dq.
template <class T, int width>
DEVICE void query_half(const AttentionBackward& args, const Tile& tile, Shared<T> shared, Operands& p, Operands& dz) {
  using At = Layout<width>;
  const Matrix<T, width> k{shared + At::k}, v{shared + At::v};
  const Rotary rotary{args.cos, args.sin};
  const auto rows = [&](int which) { return projection_rows(args, static_cast<const T*>(args.qkv), which, tile); };
  const auto dout_rows = output_rows(args, static_cast<const T*>(args.dout), tile);
  std::uint32_t q[width / 16][4], dout[width / 16][4];
  if constexpr (At::all_fit) {
    load_tile(Matrix<T, width>{shared + At::dout}, tile.row(), dout_rows);
    load_tile(v, tile.row(), rows(2));
    load_turned_tiles<2>({Matrix<T, width>{shared + At::q}, k}, tile.row(), {rows(0), rows(1)}, rotary);
  } else {
    load_operands(q, rows(0));
    load_operands(dout, dout_rows);
    load_tile(v, tile.row(), rows(2));
    load_turned_tiles<1>({k}, tile.row(), {rows(1)}, rotary);
    arrange_operands(q);
    arrange_operands(dout);
    turn_operands(q, rows(0), rotary);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (At::all_fit) read_operands(q, Matrix<T, width>{shared + At::q}, tile.row());
  probabilities(p, q, k, tile, args);
  if constexpr (At::all_fit) read_operands(dout, Matrix<T, width>{shared + At::dout}, tile.row());
  Scores dp = {};
  each_other(tile, [&](int t, int row) { multiply_transposed(dp[t], dout, v, row); });
  softmax_gradient<T>(dz, p, dp, tile);
  float dq[width / 8][4] = {};
  each_other(tile, [&](int t, int row) { multiply(dq, dz[t], k, row); });
  store_gradient<T, width>(args, 0, tile, dq);
}

// dv (which = 2) from P or dk (which = 1) from dz, in the room of k and v.
template <class T, int width>
DEVICE void key_half(const AttentionBackward& args, int which, const Tile& tile, Shared<T> shared,
                     const Operands& values) {
  using At = Layout<width>;
  const Matrix<T, block_rows> exchange{shared + At::exchange};
  const Matrix<T, width> queries{shared + (which == 2 ? At::dout : At::q)};
  __syncthreads();  // nobody reads any longer what lies there
  if constexpr (!At::all_fit) {
    if (which == 2) {
      load_tile(queries, tile.row(), output_rows(args, static_cast<const T*>(args.dout), tile));
    } else {
      load_turned_tiles<1>({queries}, tile.row(),
                           {projection_rows(args, static_cast<const T*>(args.qkv), 0, tile)},
                           Rotary{args.cos, args.sin});
    }
    cp_async_commit();
  }
  put(exchange, values, tile);
  if constexpr (!At::all_fit) cp_async_wait<0>();
  __syncthreads();
  float acc[width / 8][4] = {};
  sum_over_queries(acc, exchange, queries, tile);
  store_gradient<T, width>(args, which, tile, acc);
}

template <class T, int width>
__global__ void __launch_bounds__(threads, has_sm80 && width < 128 ? 2 : 1)
    attention_short_bwd_kernel(AttentionBackward args, int blocks_each) {
  if constexpr (can_run<T>) {
    clear_tail<T>(args);
    Tile tile;
    if (!find_tile(args, blocks_each, tile)) return;
    const Shared<T> shared = dynamic_shared<T>();
    Operands p, dz;
    query_half<T, width>(args, tile, shared, p, dz);
    key_half<T, width>(args, 2, tile, shared, p);
    key_half<T, width>(args, 1, tile, shared, dz);
  } else {
    stop("attention: bfloat16 needs sm_80 or later");
  }
}

// ---- launch

template <class Kernel, class Args>
void launch_blocks(const char* name, Kernel kernel, Cuda device, const Args& args, int shared_bytes) {
  if (args.dtype == DType::bfloat16 && code_path(kernel) < 800) {
    throw std::invalid_argument("attention: bfloat16 needs sm_80 or later; this device takes float16");
  }
  // The longest sequence that there may be has the fewest heads in a block. One block at least, for the tail.
  const std::int64_t tiles = args.max_seqlen > tile_rows ? ceil_div(args.max_seqlen, tile_rows) : 1;
  const std::int64_t blocks_each = ceil_div(args.heads, warps / tiles), blocks = args.sequences * blocks_each;
  launch(name, kernel, device, static_cast<unsigned>(blocks > 0 ? blocks : 1), threads, shared_bytes, args,
         static_cast<int>(blocks_each > 0 ? blocks_each : 1));
}

// f(null pointer of the stored type, integral constant of the head width).
template <class Args, class F>
void with_type_and_width(const Args& args, const F& f) {
  const auto with_width = [&](auto* stored) {
    switch (args.head_width) {
      case 32: return f(stored, std::integral_constant<int, 32>{});
      case 64: return f(stored, std::integral_constant<int, 64>{});
      case 128: return f(stored, std::integral_constant<int, 128>{});
      default: throw std::invalid_argument("attention: head width must be 32, 64 or 128");
    }
  };
  switch (args.dtype) {
    case DType::bfloat16: return with_width(static_cast<bf16*>(nullptr));
    case DType::float16: return with_width(static_cast<f16*>(nullptr));
    default: throw std::invalid_argument("attention: the short form takes float16 and bfloat16");
  }
}

}  // namespace

void attention_short_fwd(Cuda device, const AttentionForward& args) {
  with_type_and_width(args, [&](auto* stored, auto width) {
    using T = std::remove_pointer_t<decltype(stored)>;
    launch_blocks("attention_short_fwd", attention_short_fwd_kernel<T, width()>, device, args, forward_bytes<width()>);
  });
}

void attention_short_bwd(Cuda device, const AttentionBackward& args) {
  with_type_and_width(args, [&](auto* stored, auto width) {
    using T = std::remove_pointer_t<decltype(stored)>;
    launch_blocks("attention_short_bwd", attention_short_bwd_kernel<T, width()>, device, args, Layout<width()>::bytes);
  });
}

}  // namespace cramfast
