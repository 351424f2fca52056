// Small matrix products for operators that keep their operands in cache: C (+)= A B in float32, one register tile of C
// at a time. CPU only, compiled per instruction set as simd.h says.
//
// Operands are made of 32-bit words along the summed dimension: a word holds one float32 (struct Single) or two
// neighbouring bfloat16 (struct Pair, where the processor multiplies those at twice the rate; struct Tiles, where it has
// AMX, whose tiles are just such words: 16 rows of 16 of A, 16 by 16 of B). So a matrix exists in
// two layouts, `along` with words that run along a row and `across` with words that join two rows; for Single they
// are the same memory. A may have any strides; B needs its columns next to each other.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace cramfast::CRAMFAST_ISA {

// A register tile has tile_rows x tile_vectors accumulators, which with one row of B and one value of A just fit the
// registers: 32 of AVX-512 and NEON, 16 of the others.
#if defined(__AVX512F__)
constexpr int lanes = 16, tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int lanes = 8, tile_vectors = 2;
#elif defined(__aarch64__)
constexpr int lanes = 4, tile_vectors = 4;
#else
constexpr int lanes = 4, tile_vectors = 2;
#endif
constexpr int tile_rows = 6;
constexpr std::int64_t sum_words = 32;
constexpr int panel = lanes * tile_vectors;  // columns of B that a register tile covers

typedef float FloatVector __attribute__((vector_size(4 * lanes)));
typedef std::int32_t WordVector __attribute__((vector_size(4 * lanes)));

template <class Vector, class T>
inline Vector load_vector(const T* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector, class T>
inline void store_vector(const Vector& value, T* to) {
  std::memcpy(to, &value, sizeof value);
}

// A matrix as words, in one or both of the layouts above.
template <class Word>
struct Words {
  Word* along;   // (rows, along_stride), null where not wanted
  Word* across;  // (rows / depth, across_stride), null where not wanted
  std::int64_t along_stride, across_stride;
};

struct Single {
  using Word = float;
  using Vector = FloatVector;
  static constexpr int depth = 1;   // values in a word
  static constexpr int summed = 1;  // values that a product sums at once: operands go on in zeros up to a multiple
  static constexpr bool tiles = false;

  static FloatVector multiply_add(FloatVector sum, float a, FloatVector b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
struct Pair {
  using Word = std::int32_t;
  using Vector = WordVector;
  typedef std::uint16_t HalfVector __attribute__((vector_size(2 * lanes)));
  static constexpr int depth = 2, summed = 2;
  static constexpr bool tiles = false;

  static FloatVector multiply_add(FloatVector sum, std::int32_t a, WordVector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }

  // Rows `row` (even) and `row + 1` of a matrix of n columns, rounded.
  static void store(const Words<Word>& to, std::int64_t row, const float* even, const float* odd, std::int64_t n) {
    Word* first = to.along + row * to.along_stride;
    Word* second = first + to.along_stride;
    Word* joined = to.across + row / 2 * to.across_stride;
    for (std::int64_t i = 0; i < n; i += lanes) {
      const auto low = (HalfVector)_mm512_cvtneps_pbh(load_vector<FloatVector>(even + i));
      const auto high = (HalfVector)_mm512_cvtneps_pbh(load_vector<FloatVector>(odd + i));
      if (to.along) {
        store_vector(low, first + i / 2);
        store_vector(high, second + i / 2);
      }
      if (to.across) {
        store_vector(__builtin_convertvector(low, WordVector) | __builtin_convertvector(high, WordVector) << 16,
                     joined + i);
      }
    }
  }
};
#ifdef __AMX_BF16__
struct Tiles : Pair {
  static constexpr int summed = 32;
  static constexpr bool tiles = true;
};
using Bf16Form = Tiles;
#else
using Bf16Form = Pair;
#endif
#else
using Bf16Form = Single;
#endif

// What a thread needs around multiply<Tiles>: eight tiles of 16 rows of 64 bytes. The configuration that it had comes
// back, since other libraries (oneDNN) look at it to see whether theirs is still there.
class TileConfiguration {
#ifdef __AMX_BF16__
  struct alignas(64) Layout {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t bytes[16];
    std::uint8_t rows[16];
  };
  Layout before;

 public:
  TileConfiguration() {
    _tile_storeconfig(&before);
    Layout wanted{};
    wanted.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      wanted.bytes[tile] = 64;
      wanted.rows[tile] = 16;
    }
    _tile_loadconfig(&wanted);
  }
  ~TileConfiguration() { _tile_loadconfig(&before); }
  TileConfiguration(const TileConfiguration&) = delete;
#else
 public:
  TileConfiguration() {}  // not trivial, so that a variable of it is no unused one
#endif
};

// How values stored as T are multiplied.
template <class T>
struct FormOf {
  using type = Single;
};
template <>
struct FormOf<bf16> {
  using type = Bf16Form;
};

template <class Word>
struct Left {
  const Word* data;  // word (row, k) at data[row * row_stride + k * k_stride]
  std::int64_t row_stride, k_stride;
};

template <class Word>
struct Right {
  const Word* data;  // word (k, column) at data[column / panel * panel_stride + k * k_stride + column % panel]
  std::int64_t k_stride, panel_stride;
};

// One register tile: rows x (vectors * lanes) values of C.
template <class Form, int rows, int vectors, class Word>
inline void multiply_tile(const Left<Word> a, const Word* b, std::int64_t b_stride, std::int64_t k, float* c,
                          std::int64_t c_stride, bool accumulate) {
  FloatVector sum[rows][vectors] = {};
  for (std::int64_t i = 0; i < k; ++i) {
    typename Form::Vector right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      right[v] = load_vector<typename Form::Vector>(b + i * b_stride + v * lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Word left = a.data[r * a.row_stride + i * a.k_stride];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = Form::multiply_add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * c_stride + v * lanes;
      store_vector(accumulate ? load_vector<FloatVector>(to) + sum[r][v] : sum[r][v], to);
    }
  }
}

// The last rows, fewer than tile_rows: counts down to the tile that has just as many.
template <class Form, int rows, int vectors, class Word>
inline void multiply_last_rows(std::int64_t left, const Left<Word> a, const Word* b, std::int64_t b_stride,
                               std::int64_t k, float* c, std::int64_t c_stride, bool accumulate) {
  if constexpr (rows > 0) {
    if (left == rows) {
      multiply_tile<Form, rows, vectors>(a, b, b_stride, k, c, c_stride, accumulate);
    } else {
      multiply_last_rows<Form, rows - 1, vectors>(left, a, b, b_stride, k, c, c_stride, accumulate);
    }
  }
}

template <class Form, int vectors, class Word>
void multiply_panel(std::int64_t m, std::int64_t n, std::int64_t k, Left<Word> a, const Word* b, std::int64_t b_stride,
                    float* c, std::int64_t c_stride, bool accumulate) {
  if constexpr (vectors > 0) {
    if (n < vectors * lanes) {
      multiply_panel<Form, vectors - 1>(m, n, k, a, b, b_stride, c, c_stride, accumulate);
      return;
    }
    std::int64_t row = 0;
    for (; row + tile_rows <= m; row += tile_rows) {
      multiply_tile<Form, tile_rows, vectors>(a, b, b_stride, k, c + row * c_stride, c_stride, accumulate);
      a.data += tile_rows * a.row_stride;
    }
    multiply_last_rows<Form, tile_rows - 1, vectors>(m - row, a, b, b_stride, k, c + row * c_stride, c_stride,
                                                     accumulate);
  }
}

#ifdef __AMX_BF16__
// Up to 32 x 32 values of C in four tiles. tile_rows and tile_columns are 1 or 2; the intrinsics take literals alone.
template <int row_tiles, int column_tiles>
inline void multiply_tiles(const Left<std::int32_t> a, const std::int32_t* b, std::int64_t b_stride, std::int64_t k,
                           float* c, std::int64_t c_stride, bool accumulate) {
  constexpr bool down = row_tiles == 2, right = column_tiles == 2;
  const std::int64_t a_bytes = 4 * a.row_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
  float* const below = c + 16 * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (right) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (down) _tile_loadd(2, below, c_bytes);
    if constexpr (down && right) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (right) _tile_zero(1);
    if constexpr (down) _tile_zero(2);
    if constexpr (down && right) _tile_zero(3);
  }
  const std::int32_t* left = a.data;
  const std::int32_t* left_below = left + 16 * a.row_stride;
  for (std::int64_t i = 0; i < k; i += 16, left += 16, left_below += 16, b += 16 * b_stride) {
    _tile_loadd(4, left, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (right) {
      _tile_loadd(7, b + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (down) {
      _tile_loadd(5, left_below, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (down && right) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (right) _tile_stored(1, c + 16, c_bytes);
  if constexpr (down) _tile_stored(2, below, c_bytes);
  if constexpr (down && right) _tile_stored(3, below + 16, c_bytes);
}

template <int column_tiles>
inline void multiply_tile_columns(std::int64_t m, std::int64_t k, Left<std::int32_t> a, const std::int32_t* b,
                                  std::int64_t b_stride, float* c, std::int64_t c_stride, bool accumulate) {
  for (; m > 16; m -= 32, a.data += 32 * a.row_stride, c += 32 * c_stride) {
    multiply_tiles<2, column_tiles>(a, b, b_stride, k, c, c_stride, accumulate);
  }
  if (m > 0) multiply_tiles<1, column_tiles>(a, b, b_stride, k, c, c_stride, accumulate);
}

// As multiply() below, in whole tiles: A and C have room for 16 rows at a time, n is a multiple of 16 and k of 16 words,
// and the words of a row of A lie next to each other (k_stride 1). Sums stay in float32 in the tiles.
inline void multiply_on_tiles(std::int64_t m, std::int64_t n, std::int64_t k, Left<std::int32_t> a,
                              Right<std::int32_t> b, float* c, std::int64_t c_stride, bool accumulate) {
  asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say that they read memory
  for (std::int64_t column = 0; column < n; column += 32) {
    const std::int32_t* right = b.data + column / panel * b.panel_stride + column % panel;
    if (n - column > 16) {
      multiply_tile_columns<2>(m, k, a, right, b.k_stride, c + column, c_stride, accumulate);
    } else {
      multiply_tile_columns<1>(m, k, a, right, b.k_stride, c + column, c_stride, accumulate);
    }
  }
  asm volatile("" ::: "memory");
}
#endif

// C (m, n) (+)= A (m, k words) B (k words, n); n a multiple of lanes. Sums of sum_words words are added up, which
// costs a little traffic for C and keeps the rounding error near that of libraries that sum in several chains.
template <class Form>
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, Left<typename Form::Word> a,
              Right<typename Form::Word> b, float* c, std::int64_t c_stride, bool accumulate) {
#ifdef __AMX_BF16__
  if constexpr (Form::tiles) return multiply_on_tiles(m, n, k, a, b, c, c_stride, accumulate);
#endif
  for (std::int64_t column = 0; column < n; column += panel) {
    Left<typename Form::Word> left = a;
    const typename Form::Word* right = b.data + column / panel * b.panel_stride;
    for (std::int64_t word = 0; word < k; word += sum_words) {
      multiply_panel<Form, tile_vectors>(m, std::min<std::int64_t>(panel, n - column), std::min(sum_words, k - word),
                                         left, right, b.k_stride, c + column, c_stride, accumulate || word > 0);
      left.data += sum_words * left.k_stride;
      right += sum_words * b.k_stride;
    }
  }
}

// The transpose of lanes x lanes words in registers: halves change places between rows in log2(lanes) rounds.
template <int half, class Vector>
inline void transpose_block(Vector (&row)[lanes]) {
  if constexpr (half > 0) {
    WordVector low, high;
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      low[l] = l & half ? lanes + l - half : l;
      high[l] = l & half ? lanes + l : l + half;
    }
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      if (r & half) continue;
      const Vector first = row[r], second = row[r + half];
      row[r] = __builtin_shuffle(first, second, low);
      row[r + half] = __builtin_shuffle(first, second, high);
    }
    transpose_block<half / 2>(row);
  }
}

// Words (rows, words) -> B operand of `words` rows and `rows` columns, by panels; rows is a multiple of lanes.
template <class Form>
void transpose_words(const typename Form::Word* from, std::int64_t rows, std::int64_t words,
                     typename Form::Word* to) {
  using Vector = typename Form::Vector;
  for (std::int64_t row = 0; row < rows; row += lanes, from += lanes * words) {
    typename Form::Word* columns = to + row / panel * panel * words + row % panel;
    std::int64_t word = 0;
    for (; word + lanes <= words; word += lanes) {
      Vector block[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) block[r] = load_vector<Vector>(from + r * words + word);
      transpose_block<lanes / 2>(block);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) store_vector(block[r], columns + (word + r) * panel);
    }
    for (; word < words; ++word) {
      for (int r = 0; r < lanes; ++r) columns[word * panel + r] = from[r * words + word];
    }
  }
}

// (rows, columns) -> its transpose; both are multiples of lanes, or memory goes on up to one.
template <class Vector, class T>
void transpose(const T* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, T* to,
               std::int64_t to_stride) {
  for (std::int64_t row = 0; row < rows; row += lanes) {
    for (std::int64_t column = 0; column < columns; column += lanes) {
      Vector block[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) block[r] = load_vector<Vector>(from + (row + r) * from_stride + column);
      transpose_block<lanes / 2>(block);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) store_vector(block[r], to + (column + r) * to_stride + row);
    }
  }
}

}  // namespace cramfast::CRAMFAST_ISA
