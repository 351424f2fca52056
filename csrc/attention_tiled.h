// How the tiled form of attention cuts its work, and how tiles of columns get to shared memory.
#pragma once

#include <type_traits>

#include "attention_device.h"

namespace cramfast {

// ---- which rows and which columns

// How a block is cut: its warps, the rows of a tile of columns, how many blocks share a multiprocessor's registers, and
// whether y of the block's own rows is in registers, as x is, or in shared memory.
template <int warps_, int columns_, int blocks_, bool y_in_registers_ = true>
struct Shape {
  static constexpr int warps = warps_, columns = columns_, blocks = blocks_;
  static constexpr int threads = 32 * warps, rows = tile_rows * warps;
  static constexpr bool y_in_registers = y_in_registers_;
};

// As large as registers allow: the more rows, the less often a column is read and turned.
template <int width, bool sm80>
struct Shapes;
template <bool sm80>
struct Shapes<32, sm80> {
  using Queries = Shape<8, 64, 2>;
  using Keys = Shape<4, 32, 3>;
};
template <>
struct Shapes<64, true> {
  using Queries = Shape<8, 64, 2>;
  using Keys = Shape<4, 32, 3>;
};
template <>
struct Shapes<64, false> {  // without cp.async the next tile takes registers too
  using Queries = Shape<4, 32, 3>;
  using Keys = Shape<4, 32, 2>;
};
template <bool sm80>
struct Shapes<128, sm80> {
  using Queries = Shape<8, 32, 1>;
  using Keys = Shape<8, 16, 1, false>;
};
template <int width, bool keys, bool sm80 = has_sm80>
using ShapeOf = std::conditional_t<keys, typename Shapes<width, sm80>::Keys, typename Shapes<width, sm80>::Queries>;

// Where things lie in shared memory, in bytes: two tiles, x and y of each; lse and delta of the queries of two tiles;
// y of the block's rows.
template <int width, class S>
constexpr int statistics_offset = 2 * 2 * S::columns * width * 2;
template <int width, class S>
constexpr int y_offset = statistics_offset<width, S> + 2 * 2 * S::columns * 4;
template <int width, class S>
constexpr int shared_bytes = y_offset<width, S> + (S::y_in_registers ? 0 : S::rows * width * 2);
static_assert(shared_bytes<64, ShapeOf<64, false, false>> == 16896 &&
                  shared_bytes<64, ShapeOf<64, false, true>> == 33792 &&
                  shared_bytes<128, ShapeOf<128, true>> == 49408,
              "tests/kernels/test_sass.py has these numbers too");

// The 16 rows of a warp (none when `position` is at or past the length) and the columns of its block. The window is
// symmetric: queries see keys as keys are seen by queries.
struct Task : Place {
  int window;
  int begin, end;  // columns that some row of the block sees

  DEVICE Place start() const { return {head, first_token, length, 0}; }

  // Whether some row sees some of the columns; whether every row sees all of them.
  DEVICE bool sees_any(int column, int count) const {
    return position < length && column < position + tile_rows + window && column + count > position - window;
  }
  DEVICE bool sees_all(int column, int count) const {
    return column + count <= length && column + count <= position + window + 1 &&
           column >= position + tile_rows - 1 - window;
  }
  // Whether row g + 8 half, g = lane / 4, sees the column.
  DEVICE bool sees(int half, int column) const {
    const int distance = column - (position + lane_id() / 4 + 8 * half);
    return column < length && distance <= window && -distance <= window;
  }
};

// Returns whether the block has rows.
template <class S, class Args>
DEVICE bool find_task(const Args& args, unsigned tiles, Task& task) {
  if (!find_sequence(args, blockIdx.x / tiles, task)) return false;
  const int row = static_cast<int>(blockIdx.x % tiles) * S::rows;
  if (row >= task.length) return false;
  task.head = static_cast<int>(blockIdx.y);
  task.window = args.window < 0 || args.window > task.length ? task.length : static_cast<int>(args.window);
  task.position = row + warp_id() * tile_rows;
  task.begin = row > task.window ? (row - task.window) / tile_rows * tile_rows : 0;
  task.end = row + S::rows + task.window < task.length ? row + S::rows + task.window : task.length;
  return true;
}

// ---- columns

// Tiles of columns on their way from global to shared memory. From sm_80 on they are copied asynchronously and each
// thread turns in place what it has copied itself; before, they wait in registers.
template <class T, int width, class S>
class Columns {
  static constexpr int half = width / 16;  // 16-byte chunks in half a row; each turns with its like in the other half
  static constexpr int pairs = S::columns * half, pieces = 2 * pairs / S::threads;
  static_assert(2 * pairs % S::threads == 0);

 public:
  // Rows from the start of the sequence on.
  DEVICE Columns(const Rows<const T>& x_, const Rows<const T>& y_, const Rotary& rotary_)
      : x(x_.data),
        y(y_.data),
        x_stride(static_cast<unsigned>(x_.stride)),
        y_stride(static_cast<unsigned>(y_.stride)),
        length(x_.count),
        rotary(rotary_) {}

  DEVICE Matrix<T, width> x_tile(int buffer) const {
    return {dynamic_shared<T>() + buffer * 2 * S::columns * width};
  }
  DEVICE Matrix<T, width> y_tile(int buffer) const {
    return {dynamic_shared<T>() + (buffer * 2 + 1) * S::columns * width};
  }

  DEVICE void begin(int buffer, int column) {
    each_pair(buffer, column, [&](const Pair& pair, Chunk(&wait)[2]) {
      if constexpr (has_sm80) {
        cp_async16(pair.low, pair.from, pair.present);
        cp_async16(pair.high, pair.from + width / 2, pair.present);
      } else {
        wait[0] = pair.present ? load_chunk(pair.from) : Chunk{};
        wait[1] = pair.present ? load_chunk(pair.from + width / 2) : Chunk{};
      }
    });
    cp_async_commit();
  }

  // Afterwards the tile is complete behind a barrier.
  DEVICE void finish(int buffer, int column) {
    cp_async_wait<0>();
    each_pair(buffer, column, [&](const Pair& pair, Chunk(&wait)[2]) {
      const bool turns = pair.of_x && pair.present && rotary.cos;
      if (has_sm80 && !turns) return;
      const auto low = shared_cast<Chunk>(pair.low), high = shared_cast<Chunk>(pair.high);
      if constexpr (has_sm80) {
        wait[0] = low[0];
        wait[1] = high[0];
      }
      if (turns) turn_pair(wait, pair.angle);
      low[0] = wait[0];
      high[0] = wait[1];
    });
  }

 private:
  struct Pair {
    bool of_x, present;
    const T* from;
    Shared<T> low, high;
    int angle;
  };

  const T *x, *y;
  const unsigned x_stride, y_stride;
  const int length;
  const Rotary rotary;
  Chunk waiting[has_sm80 ? 1 : pieces][2];

  template <class F>
  DEVICE void each_pair(int buffer, int column, const F& f) {
    unsigned thread = threadIdx.x;
    compute_again(thread);  // addresses are cheaper than the registers they would live in from tile to tile
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      const unsigned i = thread + piece * S::threads, r = i % pairs / half;
      const int c = static_cast<int>(i % half * 8);
      // 0, 4, 1, 5, ...: eight lanes then meet no bank twice.
      const int row = static_cast<int>((r & ~7u) + (r >> 1 & 3) + 4 * (r & 1));
      const bool of_x = pairs >= S::threads ? 2 * piece < pieces : i < pairs, present = column + row < length;
      const std::uint64_t position = present ? column + row : 0;
      const T* from = (of_x ? x + position * x_stride : y + position * y_stride) + c;
      const Matrix<T, width> tile = of_x ? x_tile(buffer) : y_tile(buffer);
      const Shared<T> low = tile.data + tile.chunk(row, c), high = tile.data + tile.chunk(row, c + width / 2);
      const int angle = (column + row) * (width / 2) + c;
      f(Pair{of_x, present, from, low, high, angle}, waiting[has_sm80 ? 0 : piece]);
    }
  }

  DEVICE void turn_pair(Chunk (&pair)[2], int angle) const {
    const Pack<float, 8> cos = load_floats<8>(rotary.cos + angle), sin = load_floats<8>(rotary.sin + angle);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      turn<T>(pair[0].value[j], pair[1].value[j], make_float2(cos.value[2 * j], cos.value[2 * j + 1]),
              make_float2(sin.value[2 * j], sin.value[2 * j + 1]));
    }
  }
};

// f(buffer, first column) for each tile, which the loads (Columns and such) bring to shared memory one tile ahead;
// they have begun the first. One barrier a tile: behind it this tile is there and the buffer of the one before is free.
template <class S, class F, class... Loads>
DEVICE void each_tile(const Task& task, const F& f, Loads&... loads) {
  int buffer = 0;
#pragma unroll 1
  for (int column = task.begin; column < task.end; column += S::columns, buffer ^= 1) {
    (loads.finish(buffer, column), ...);
    __syncthreads();
    if (column + S::columns < task.end) (loads.begin(buffer ^ 1, column + S::columns), ...);
    f(buffer, column);
  }
}

}  // namespace cramfast
