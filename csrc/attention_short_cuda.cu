#include <cmath>
#include <type_traits>

#include "attention_device.h"
#include "attention_forms.h"

// A block of eight warps serves one sequence: one head of more than 64 tokens, two of more than 32, four of more than
// 16, else eight, so that 16 tokens cost one warp and not eight. All lengths share one launch. Keys and values of a
// head are on chip as a whole: no online softmax, and the backward pass sees all of a row of dP before it needs the
// row's mean, so that it reads no output and subtracts no rounded number.
//
// The warp of a tile of 16 rows owns them as queries: scores never leave it. Backward it owns them as keys too, and P
// and dz change hands through shared memory. Nothing is computed twice, nothing is added in two places.
//
//   forward    z = q k^T, P = softmax(z), out = P v                                q in registers; k, v shared
//   backward   z = q k^T, P;  dP = dout v^T, dz = P (dP - sum P dP);  dq = dz k    q, dout, k, v shared
//              dv = P^T dout                                                       P, dout shared
//              dk = dz^T q                                                         dz, q shared
// Where shared memory has no room for P beside the rest, P stays in registers until k and v have gone. At head width
// 128 only k and v fit (64 KiB on Turing): there q and dout come through registers first, and into shared memory, from
// the L2 cache as a rule, for the second half.

namespace cramfast {
namespace {

constexpr int warps = 8, threads = 32 * warps, block_rows = warps * tile_rows;
static_assert(block_rows == attention_short_max);

using Scores = float[warps][2][4];         // accumulators of 16 queries against every tile of keys
using Operands = std::uint32_t[warps][4];  // the same, rounded

// ---- whose rows a warp works on

struct Tile : Place {
  int head_row;     // row of the head's first token in the shared matrices
  unsigned others;  // bit t: its queries attend keys of tile t and, windows being symmetric, the other way round
};

DEVICE int own_row() { return warp_id() * tile_rows; }

// Whether this warp has one. blocks_each: blocks for one sequence.
template <class Args>
DEVICE bool find_tile(const Args& args, unsigned blocks_each, Tile& tile) {
  if (!find_sequence(args, blockIdx.x / blocks_each, tile)) return false;
  const int bucket = tile.length > 64 ? 8 : tile.length > 32 ? 4 : tile.length > 16 ? 2 : 1;  // warps for a head
  const int slot = warp_id() / bucket;
  tile.head = static_cast<int>(blockIdx.x % blocks_each) * (warps / bucket) + slot;
  tile.head_row = slot * bucket * tile_rows;
  tile.position = own_row() - tile.head_row;
  if (tile.head >= args.heads || tile.position >= tile.length) return false;
  const int end = tile.position + tile_rows < tile.length ? tile.position + tile_rows : tile.length;
  const int first = attended(tile.position, tile.length, args.window).first / tile_rows;
  const int last = (attended(end - 1, tile.length, args.window).last - 1) / tile_rows;
  tile.others = (2u << last) - (1u << first);
  return true;
}

// f(t) for the others. Unrolled: arrays of registers want constant indices.
template <class F>
DEVICE void each_other(const Tile& tile, const F& f) {
#pragma unroll
  for (int t = 0; t < warps; ++t) {
    if (tile.others >> t & 1) f(t);
  }
}

// f(score, half, key) for the eight of this lane in tile t; half: of the lane's two rows, 0 is g and 1 is g + 8; key:
// less the lane's first key.
template <class F>
DEVICE void each_score(float (&z)[2][4], int t, const F& f) {
#pragma unroll
  for (int i = 0; i < 8; ++i) f(z[i / 4][i % 4], i % 4 / 2, t * tile_rows + 8 * (i / 4) + i % 2);
}

// The keys that the queries of this lane's two rows attend, less the lane's first key.
struct Keys {
  Span of[2];

  DEVICE Keys(const Tile& tile, std::int64_t window) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Span all = attended(tile.position + lane_id() / 4 + 8 * half, tile.length, window);
      of[half] = {all.first - lane_id() % 4 * 2, all.last - lane_id() % 4 * 2};
    }
  }
  DEVICE bool attends(int half, int key) const { return key >= of[half].first && key < of[half].last; }
};

// ---- forward

// z -> exp2(scale z - largest) in place, 0 for keys that are not attended; largest (scaled) and sum of both rows.
DEVICE void softmax(Scores& z, const Tile& tile, const Keys& keys, float scale, float (&largest)[2], float (&sum)[2]) {
  largest[0] = largest[1] = -INFINITY;
  each_other(tile, [&](int t) {
    each_score(z[t], t, [&](float& score, int half, int key) {
      if (!keys.attends(half, key)) score = -INFINITY;
      largest[half] = fmaxf(largest[half], score);
    });
  });
  for (float& top : largest) top = quad_max(top) * scale;
  sum[0] = sum[1] = 0.0f;
  each_other(tile, [&](int t) {
    each_score(z[t], t, [&](float& score, int half, int) {
      score = exp2_approx(score * scale - largest[half]);
      sum[half] += score;
    });
  });
  for (float& total : sum) total = quad_sum(total);
}

template <int width>
constexpr int forward_bytes = 2 * block_rows * width * 2;  // k and v
static_assert(forward_bytes<64> == 32 << 10, "two blocks on a multiprocessor of sm_75");

template <class T, int width>
__global__ void __launch_bounds__(threads, width < 128 ? 2 : 1)
    attention_short_fwd_kernel(AttentionForward args, unsigned blocks_each) {
  if constexpr (has_tensor_cores<T>) {
    clear_tail<T>(args);
    Tile tile;
    if (!find_tile(args, blocks_each, tile)) return;
    const Matrix<T, width> k{dynamic_shared<T>()}, v{k.data + block_rows * width};
    const Rotary rotary{args.cos, args.sin};
    const auto rows = [&](int which) { return projection_rows(args, static_cast<const T*>(args.qkv), which, tile); };
    std::uint32_t q[width / 16][4];
    load_operands(q, rows(0));
    load_tile(v, own_row(), rows(2));
    load_turned_tiles<1>({k}, own_row(), {rows(1)}, rotary);
    cp_async_commit();
    arrange_operands(q);
    turn_operands(q, rows(0), rotary);
    cp_async_wait<0>();
    __syncthreads();

    Scores z = {};
    const int across = k.across(tile.head_row), down = v.down(tile.head_row);
    each_other(tile, [&](int t) { multiply_transposed(z[t], q, k, across, t * tile_rows); });
    float largest[2], sum[2], out[width / 8][4] = {};
    softmax(z, tile, Keys(tile, args.window), log2_e * score_scale<width>, largest, sum);
    each_other(tile, [&](int t) {
      std::uint32_t p[4];
      round_to_operand<T>(p, z[t]);
      multiply(out, p, v, down, t * tile_rows);
    });
    for (int half = 0; half < 2; ++half) {
      const int row = tile.position + lane_id() / 4 + 8 * half;
      scale_row(out, half, 1.0f / sum[half]);
      if (lane_id() % 4 == 0 && row < tile.length) {
        args.lse[tile.head * args.tokens + tile.first_token + row] = ln_2 * largest[half] + logf(sum[half]);
      }
    }
    store_tile(output_rows(args, static_cast<T*>(args.out), tile), out);
  }
}

// ---- backward

// Where matrices lie in shared memory, in values.
template <int width, bool sm80>
struct Layout {
  static constexpr bool all_fit = width < 128;             // q and dout beside k and v
  static constexpr bool apart = width == 32 || (width == 64 && sm80);  // and P too
  static constexpr int matrix = block_rows * width, square = block_rows * block_rows;
  static constexpr int q = 0, dout = all_fit ? matrix : 0, k = all_fit ? 2 * matrix : 0, v = k + matrix;
  static constexpr int exchange = apart ? v + matrix : all_fit ? k : v;  // P, then dz
  static constexpr int end = exchange + square > v + matrix ? exchange + square : v + matrix;
  static constexpr int bytes = end * 2;
};
static_assert(Layout<32, false>::bytes == 64 << 10 && Layout<64, false>::bytes == 64 << 10 &&
                  Layout<128, false>::bytes == 64 << 10,
              "a block of sm_75 has no more");
static_assert(Layout<32, true>::bytes == 64 << 10 && Layout<128, true>::bytes == 64 << 10);
static_assert(Layout<64, true>::bytes == 96 << 10, "a block of sm_86 has 99 KiB; two fit on sm_90");

// Rows of P or dz, (queries, keys), that warps hand to each other.
template <class T>
using Exchange = Matrix<T, block_rows>;

// A lane's values of tile t of the own rows.
template <class T>
DEVICE Shared<std::uint32_t> own_values(const Exchange<T>& exchange, int t, int i) {
  const int place = exchange.chunk(own_row() + lane_id() / 4 + 8 * (i % 2), t * tile_rows + 8 * (i / 2));
  return shared_cast<std::uint32_t>(exchange.data + place + lane_id() % 4 * 2);
}
template <class T>
DEVICE void put(const Exchange<T>& exchange, int t, const std::uint32_t (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) own_values(exchange, t, i)[0] = values[i];
}

// P of the tile, from the log-sum-exp of the forward pass: f(t, operand).
template <class T, int width, class F>
DEVICE void probabilities(const std::uint32_t (&q)[width / 16][4], const Matrix<T, width>& k, const Tile& tile,
                          const AttentionBackward& args, const F& f) {
  const Keys keys(tile, args.window);
  const int across = k.across(tile.head_row);
  float lse[2];
  for (int half = 0; half < 2; ++half) {
    const int row = tile.position + lane_id() / 4 + 8 * half;
    lse[half] = row < tile.length ? log2_e * args.lse[tile.head * args.tokens + tile.first_token + row] : INFINITY;
  }
  each_other(tile, [&](int t) {
    float z[2][4] = {};
    multiply_transposed(z, q, k, across, t * tile_rows);
    each_score(z, t, [&](float& score, int half, int key) {
      const float power = exp2_approx(score * (log2_e * score_scale<width>) - lse[half]);
      score = keys.attends(half, key) ? power : 0.0f;
    });
    std::uint32_t p[4];
    round_to_operand<T>(p, z);
    f(t, p);
  });
}

// dz = P (dP - mean), mean = sum P dP / sum P over the row. P, from p(t, i), is the rounded one that dv is made of, so
// that dz sums to zero over a row whatever rounding did to P.
template <class T, class P>
DEVICE void softmax_gradient(Operands& dz, const P& p, const Scores& dp, const Tile& tile) {
  float sum[2] = {}, mean[2] = {};
  each_other(tile, [&](int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(p(t, i));
      const float* slope = &dp[t][i / 2][i % 2 * 2];
      sum[i % 2] += pair.x + pair.y;
      mean[i % 2] += pair.x * slope[0] + pair.y * slope[1];
    }
  });
  for (int half = 0; half < 2; ++half) {
    const float total = quad_sum(sum[half]), weighted = quad_sum(mean[half]);
    mean[half] = total > 0.0f ? weighted / total : 0.0f;  // a missing row has no P
  }
  each_other(tile, [&](int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(p(t, i));
      const float* slope = &dp[t][i / 2][i % 2 * 2];
      dz[t][i] = pack2<T>(pair.x * (slope[0] - mean[i % 2]), pair.y * (slope[1] - mean[i % 2]));
    }
  });
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

// One tile's share of a head's gradients.
template <class T, int width>
struct Backward {
  using At = Layout<width, has_sm80>;
  const AttentionBackward& args;
  const Tile& tile;
  const Shared<T> shared = dynamic_shared<T>();
  const Matrix<T, width> q{shared + At::q}, dout{shared + At::dout}, k{shared + At::k}, v{shared + At::v};
  const Exchange<T> exchange{shared + At::exchange};
  Operands p, dz;  // p: only where it is not in shared memory from the start

  DEVICE Rows<const T> rows(int which) const {
    return projection_rows(args, static_cast<const T*>(args.qkv), which, tile);
  }
  DEVICE Rows<const T> dout_rows() const { return output_rows(args, static_cast<const T*>(args.dout), tile); }
  DEVICE Rotary rotary() const { return {args.cos, args.sin}; }

  // Everything that needs k and v: P and dz of the tile, and its dq.
  DEVICE void as_queries() {
    std::uint32_t own_q[width / 16][4], own_dout[width / 16][4];
    if constexpr (At::all_fit) {
      load_tile(dout, own_row(), dout_rows());
      load_tile(v, own_row(), rows(2));
      load_turned_tiles<2>({q, k}, own_row(), {rows(0), rows(1)}, rotary());
    } else {
      load_operands(own_q, rows(0));
      load_operands(own_dout, dout_rows());
      load_tile(v, own_row(), rows(2));
      load_turned_tiles<1>({k}, own_row(), {rows(1)}, rotary());
      arrange_operands(own_q);
      arrange_operands(own_dout);
      turn_operands(own_q, rows(0), rotary());
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int own = q.down(own_row()), down = k.down(tile.head_row), across = v.across(tile.head_row);
    if constexpr (At::all_fit) read_operands(own_q, q, own);
    probabilities(own_q, k, tile, args, [&](int t, const std::uint32_t(&operand)[4]) {
      if constexpr (At::apart) {
        put(exchange, t, operand);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[t][i] = operand[i];
      }
    });
    Scores dp = {};
    if constexpr (At::all_fit) {
#pragma unroll
      for (int columns = 0; columns < width; columns += 32) {  // not all at once: registers are scarce here
        std::uint32_t some[2][4];
        read_operands(some, dout, own, columns);
        each_other(tile, [&](int t) { multiply_transposed(dp[t], some, v, across, t * tile_rows, columns); });
      }
    } else {
      each_other(tile, [&](int t) { multiply_transposed(dp[t], own_dout, v, across, t * tile_rows); });
    }
    softmax_gradient<T>(dz, [&](int t, int i) -> std::uint32_t {
      if constexpr (At::apart) {
        return own_values(exchange, t, i)[0];
      } else {
        return p[t][i];
      }
    }, dp, tile);
    float dq[width / 8][4] = {};
    each_other(tile, [&](int t) { multiply(dq, dz[t], k, down, t * tile_rows); });
    store_gradient<T, width>(args, 0, tile, dq);
  }

  // dv from P and dk from dz.
  DEVICE void as_keys() {
    if constexpr (!At::apart) {
      __syncthreads();  // before P goes where k and v have been read
      if constexpr (!At::all_fit) load_tile(dout, own_row(), dout_rows());
      each_other(tile, [&](int t) { put(exchange, t, p[t]); });
      cp_async_commit();
      cp_async_wait<0>();
    }
    __syncthreads();
    sum_over_queries(2, dout);
    __syncthreads();  // before dz goes where P has been read
    if constexpr (!At::all_fit) load_turned_tiles<1>({q}, own_row(), {rows(0)}, rotary());
    each_other(tile, [&](int t) { put(exchange, t, dz[t]); });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    sum_over_queries(1, q);
  }

  // Gradient of k (1) or v (2): the tile's columns of what is exchanged, transposed, times the rows of all queries.
  DEVICE void sum_over_queries(int which, const Matrix<T, width>& queries) {
    const int across = exchange.across(tile.head_row, tile.position), down = queries.down(tile.head_row);
    float sum[width / 8][4] = {};
#pragma unroll 1
    for (int t = 0; t < warps; ++t) {
      if (!(tile.others >> t & 1)) continue;
      std::uint32_t a[4];
      exchange.a_transposed(a, across, t * tile_rows, 0);
      multiply(sum, a, queries, down, t * tile_rows);
    }
    store_gradient<T, width>(args, which, tile, sum);
  }
};

template <class T, int width>
__global__ void __launch_bounds__(threads, has_sm80 && width < 128 ? 2 : 1)
    attention_short_bwd_kernel(AttentionBackward args, unsigned blocks_each) {
  if constexpr (has_tensor_cores<T>) {
    clear_tail<T>(args);
    Tile tile;
    if (!find_tile(args, blocks_each, tile)) return;
    Backward<T, width> backward{args, tile};
    backward.as_queries();
    backward.as_keys();
  }
}

// ---- launch

// Shared memory depends on the path that the kernel takes: before sm_80 or from there on.
template <class Kernel, class Args>
void launch_blocks(const char* name, Kernel kernel, Cuda device, const Args& args, int bytes_before, int bytes_sm80) {
  const bool sm80 = takes_sm80_path("attention", kernel, args.dtype);
  // The longest sequence that there may be has the fewest heads in a block. One block at least, for the tail.
  const int heads = args.max_seqlen > 64 ? 1 : args.max_seqlen > 32 ? 2 : args.max_seqlen > 16 ? 4 : 8;
  const std::int64_t blocks_each = ceil_div(args.heads, heads), blocks = args.sequences * blocks_each;
  launch(name, kernel, device, static_cast<unsigned>(blocks > 0 ? blocks : 1), threads,
         sm80 ? bytes_sm80 : bytes_before, args, static_cast<unsigned>(blocks_each > 0 ? blocks_each : 1));
}

}  // namespace

void attention_short_fwd(Cuda device, const AttentionForward& args) {
  with_half_type("attention", args.dtype, [&](auto* stored) {
    with_head_width(args.head_width, [&](auto head_width) {
      using T = std::remove_pointer_t<decltype(stored)>;
      constexpr int width = decltype(head_width)::value;
      launch_blocks("attention_short_fwd", attention_short_fwd_kernel<T, width>, device, args, forward_bytes<width>,
                    forward_bytes<width>);
    });
  });
}

void attention_short_bwd(Cuda device, const AttentionBackward& args) {
  with_half_type("attention", args.dtype, [&](auto* stored) {
    with_head_width(args.head_width, [&](auto head_width) {
      using T = std::remove_pointer_t<decltype(stored)>;
      constexpr int width = decltype(head_width)::value;
      launch_blocks("attention_short_bwd", attention_short_bwd_kernel<T, width>, device, args,
                    Layout<width, false>::bytes, Layout<width, true>::bytes);
    });
  });
}

}  // namespace cramfast
