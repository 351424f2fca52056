#include "layernorm_glu.h"

#include "activations.h"
#include "layernorm.h"
#include "warp_matrix.h"

// A block of eight warps makes 128 rows by 128 columns of the pre-activations, 64 features with both halves. Tiles of
// 32 columns of the operands wait in shared memory: three of them on cp.async from sm_80 on; two before, the next one
// carried in registers meanwhile. 48 or 32 KiB and at most 128 registers: two blocks on a multiprocessor, so that one
// gates and stores while the other multiplies.

namespace cramfast {
namespace {

constexpr int warps = 8, threads = 32 * warps, fold_warps = 8;
constexpr int block_rows = 128, depth = 32, tile_values = block_rows * depth;  // of either operand
constexpr int warp_rows = 32, warp_columns = 64;                               // of the result
constexpr int group = warp_columns / 2;                                        // features of a warp
constexpr int pass_rows = threads / 4;  // rows that all threads copy at once, four chunks each
constexpr int stages = has_sm80 ? 3 : 2;
constexpr unsigned band = 8;  // tiles of rows whose columns are made together

template <class T>
using Tile = Matrix<T, depth>;

// The row of the folded weight for a feature of one half (0: a, 1: g). A warp multiplies 64 such rows: four fragments
// of a, four of g for the same 32 features. Lane t of four owns columns 2t and 2t + 1 of each fragment; in this order
// they are eight neighbouring features, and it stores 16 bytes.
DEVICE std::int64_t folded_row(int half, std::int64_t feature) {
  const int i = static_cast<int>(feature % group), t = i / 8, fragment = i % 8 / 2;
  return feature / group * warp_columns + half * group + fragment * 8 + 2 * t + i % 2;
}

// One row of the weight each warp: W gamma, its sum, and W beta.
template <class T>
__global__ void __launch_bounds__(32 * fold_warps)
    layernorm_glu_fold_kernel(LayerNormGluForward args, std::int64_t rows) {
  const std::int64_t padded = rows / 2, row = static_cast<std::int64_t>(blockIdx.x) * fold_warps + warp_id();
  if (row >= rows) return;
  const int half = row >= padded, D = static_cast<int>(args.width);
  const std::int64_t feature = row - half * padded, column = half * args.features + feature;
  const bool inside = feature < args.features;
  const T* weight = static_cast<const T*>(args.weight) + column * D;
  T* folded = static_cast<T*>(args.folded) + folded_row(half, feature) * D;
  float u = 0.0f, c = 0.0f;
  for (int d = lane_id() * 8; d < D; d += 32 * 8) {
    Pack<T, 8> w{};
    if (inside) {
      w = load<8>(weight + d);
      const Pack<float, 8> gamma = load_floats<8>(args.norm_weight + d);
      Pack<float, 8> beta{};
      if (args.norm_bias) beta = load_floats<8>(args.norm_bias + d);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float raw = widen(w.value[i]);
        w.value[i] = narrow<T>(raw * gamma.value[i]);
        u += widen(w.value[i]);
        c += raw * beta.value[i];
      }
    }
    store<8>(folded + d, w);
  }
  u = warp_sum(u);
  c = warp_sum(c);
  if (lane_id() == 0 && inside) {
    args.correction[column] = u;
    args.correction[2 * args.features + column] = c;
  }
}

// First row and column of the block's result. Bands of eight tiles of rows, in each one column of tiles after the
// other: what the blocks at work at one time read is then smaller than in whole rows of tiles, and stays in the L2 cache.
struct Corner {
  std::int64_t row, column;

  DEVICE Corner(std::int64_t rows, std::int64_t columns) {
    const unsigned row_tiles = static_cast<unsigned>((rows + block_rows - 1) / block_rows);
    const unsigned column_tiles = static_cast<unsigned>((columns + block_rows - 1) / block_rows);
    const unsigned first = blockIdx.x / (band * column_tiles) * band, place = blockIdx.x - first * column_tiles;
    const unsigned height = row_tiles - first < band ? row_tiles - first : band;
    row = std::int64_t{first + place % height} * block_rows;
    column = std::int64_t{place / height} * block_rows;
  }
};

// The rows of one operand that a block multiplies, on their way into shared memory, 32 columns at a time. A thread
// copies one chunk of two rows. Beyond the last row it repeats that row, whose products nobody stores; beyond the last
// column it writes zeros.
template <class T>
class Operand {
 public:
  DEVICE Operand(const T* matrix, std::int64_t first_row, std::int64_t rows, int width) {
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const std::int64_t wanted = first_row + row + pass * pass_rows;
      from[pass] = matrix + (wanted < rows ? wanted : rows - 1) * width + column;
    }
    columns_left = width - column;
    place = Tile<T>::chunk(row, column);
  }

  // Starts the way of the next tile: to `tile` where copies are asynchronous, else into registers.
  DEVICE void fetch(Shared<T> tile) {
    const bool valid = columns_left > 0;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      if constexpr (has_sm80) {
        cp_async16(tile + (place + pass * pass_rows * depth), from[pass], valid);
      } else {
        held[pass] = valid ? load_chunk(from[pass]) : Chunk{};
      }
      from[pass] += depth;
    }
    columns_left -= depth;
  }

  // Ends it, where fetch could not.
  DEVICE void deliver(Shared<T> tile) const {
    if constexpr (!has_sm80) {
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
        shared_cast<Chunk>(tile + (place + pass * pass_rows * depth))[0] = held[pass];
      }
    }
  }

 private:
  const T* from[2];
  int columns_left, place;
  Chunk held[2];
};

// sum += rows columns^T over the 16 columns of the tiles from `column` on, for the 32 x 64 values of a warp: 6 ldmatrix
// and 16 mma (32 before sm_80).
template <class T>
DEVICE void multiply(float (&sum)[2][8][4], const Tile<T>& rows, const Tile<T>& columns, int column) {
  std::uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) rows.a(a[i], rows.down(0), 16 * i, column);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    std::uint32_t b[4];
    columns.b_transposed(b, columns.across(0), 16 * pair, column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mma_m16n8k16<T>(sum[i][2 * pair], a[i], b);
      mma_m16n8k16<T>(sum[i][2 * pair + 1], a[i], b + 2);
    }
  }
}

// From the products of raw rows to pre-activations and h: four rows of eight features for each thread. The gate takes
// the pre-activations as they are stored, so that h is what glu_fwd makes of `gates`, bit for bit.
template <class T, class Act>
DEVICE void write_gated(const LayerNormGluForward& args, const float (&sum)[2][8][4], std::int64_t first_row,
                        std::int64_t feature) {
  const std::int64_t F = args.features;
  if (feature >= F) return;
  const float *u = args.correction + feature, *c = u + 2 * F;
  const Pack<float, 8> ua = load_floats<8>(u), ug = load_floats<8>(u + F);
  const Pack<float, 8> ca = load_floats<8>(c), cg = load_floats<8>(c + F);
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int i = quarter / 2, second = quarter % 2 * 2;  // fragment rows g and g + 8: values 0, 1 and 2, 3
    const std::int64_t row = first_row + 8 * quarter;
    if (row >= args.rows) return;
    const float mean = args.mean[row], rstd = args.rstd[row];
    Pack<T, 8> a, g, h;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      a.value[k] = narrow<T>(rstd * (sum[i][k / 2][second + k % 2] - mean * ua.value[k]) + ca.value[k]);
      g.value[k] = narrow<T>(rstd * (sum[i][4 + k / 2][second + k % 2] - mean * ug.value[k]) + cg.value[k]);
      h.value[k] = narrow<T>(Act::value(widen(a.value[k])) * widen(g.value[k]));
    }
    T* gates = static_cast<T*>(args.gates) + row * 2 * F + feature;
    store<8>(gates, a);
    store<8>(gates + F, g);
    store<8>(static_cast<T*>(args.h) + row * F + feature, h);
  }
}

template <class T, class Act>
__global__ void __launch_bounds__(threads, 2)
    layernorm_glu_fwd_kernel(LayerNormGluForward args, const T* stream, std::int64_t columns) {
  if constexpr (has_tensor_cores<T>) {
    SHARED(T, tiles, 2 * stages * tile_values);  // rows and columns of each stage
    const int D = static_cast<int>(args.width), steps = (D + depth - 1) / depth;
    const Corner corner(args.rows, columns);
    Operand<T> a(stream, corner.row, args.rows, D);
    Operand<T> b(static_cast<const T*>(args.folded), corner.column, columns, D);
    const int row = warp_id() / 2 * warp_rows, column = warp_id() % 2 * warp_columns;

    float sum[2][8][4] = {};
    for (int step = 0; step < stages - 1; ++step) {
      const Shared<T> tile = tiles + step * 2 * tile_values;
      if (step < steps) {
        a.fetch(tile);
        b.fetch(tile + tile_values);
        a.deliver(tile);
        b.deliver(tile + tile_values);
      }
      cp_async_commit();
    }
    int reads = 0, writes = stages - 1;  // the stage multiplied now, and the one that was free first
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<stages - 2>();
      __syncthreads();  // the tile is there for all, and all have done with the one before it
      const bool more = step + stages - 1 < steps;
      const Shared<T> next = tiles + writes * 2 * tile_values, tile = tiles + reads * 2 * tile_values;
      const Tile<T> rows_here{tile + row * depth}, columns_here{tile + (tile_values + column * depth)};
      // One operand after the other: before sm_80 the second needs the registers of the first.
      if (more) a.fetch(next);
      multiply(sum, rows_here, columns_here, 0);
      if (more) {
        a.deliver(next);
        b.fetch(next + tile_values);
      }
      cp_async_commit();
      multiply(sum, rows_here, columns_here, 16);
      if (more) b.deliver(next + tile_values);
      writes = reads;
      reads = reads + 1 == stages ? 0 : reads + 1;
    }
    write_gated<T, Act>(args, sum, corner.row + row + lane_id() / 4, (corner.column + column) / 2 + lane_id() % 4 * 8);
  }
}

template <class T, class Act>
void launch_kernels(Cuda device, const LayerNormGluForward& args) {
  const auto kernel = layernorm_glu_fwd_kernel<T, Act>;
  takes_sm80_path("layernorm_glu", kernel, args.dtype);  // refuses what the kernel has no body for
  const void* stream = args.residual ? args.stream : args.x;
  const std::int64_t columns = layernorm_glu_folded(device, args.features);
  const std::int64_t blocks = ceil_div(args.rows, block_rows) * ceil_div(columns, block_rows);
  layernorm_fwd(device, {args.x, args.residual, args.norm_weight, args.norm_bias, nullptr, args.stream, args.mean,
                         args.rstd, args.rows, args.width, args.eps, args.dtype});
  launch("layernorm_glu_fold", layernorm_glu_fold_kernel<T>, device,
         static_cast<unsigned>(ceil_div(columns, fold_warps)), 32 * fold_warps, 0, args, columns);
  launch("layernorm_glu_fwd", kernel, device, static_cast<unsigned>(blocks), threads, 0, args,
         static_cast<const T*>(stream), columns);
}

}  // namespace

std::int64_t layernorm_glu_folded(Cuda, std::int64_t features) { return 2 * group * ceil_div(features, group); }

void layernorm_glu_fwd(Cuda device, const LayerNormGluForward& args) {
  with_half_type("layernorm_glu", args.dtype, [&](auto* stored) {
    with_activation(args.activation, [&](auto activation) {
      launch_kernels<std::remove_pointer_t<decltype(stored)>, decltype(activation)>(device, args);
    });
  });
}

}  // namespace cramfast
