#include "glu.h"

#include "activations.h"

// A block takes a tile of rows and walks over its pieces of `vec` values (16 bytes, or one value where F is not a
// multiple of that): a and g of a piece meet in one thread, and nothing is read or written twice.

namespace cramfast {
namespace {

constexpr int threads = 256, pieces_each = 4;

// f(row, first feature of the piece) for every piece of the block's rows. 32-bit division: a tile is small.
template <int vec, class F>
DEVICE void over_pieces(std::int64_t rows, std::int64_t features, int tile_rows, const F& f) {
  const unsigned row_pieces = static_cast<unsigned>(features / vec);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * tile_rows;
  const unsigned here = static_cast<unsigned>(rows - first < tile_rows ? rows - first : tile_rows);
  for (unsigned piece = threadIdx.x; piece < here * row_pieces; piece += threads) {
    const unsigned row = piece / row_pieces;
    f(first + row, static_cast<std::int64_t>(piece - row * row_pieces) * vec);
  }
}

template <class T, int vec, class Act>
__global__ void __launch_bounds__(threads) glu_fwd_kernel(GluForward args, int tile_rows) {
  const std::int64_t F = args.features;
  over_pieces<vec>(args.rows, F, tile_rows, [&](std::int64_t row, std::int64_t f) {
    const T* x = static_cast<const T*>(args.x) + row * 2 * F + f;
    const Pack<T, vec> a = load<vec>(x), g = load<vec>(x + F);
    Pack<T, vec> h;
#pragma unroll
    for (int i = 0; i < vec; ++i) h.value[i] = narrow<T>(Act::value(widen(a.value[i])) * widen(g.value[i]));
    store<vec>(static_cast<T*>(args.h) + row * F + f, h);
  });
}

template <class T, int vec, class Act>
__global__ void __launch_bounds__(threads) glu_bwd_kernel(GluBackward args, int tile_rows) {
  const std::int64_t F = args.features;
  over_pieces<vec>(args.rows, F, tile_rows, [&](std::int64_t row, std::int64_t f) {
    const T* x = static_cast<const T*>(args.x) + row * 2 * F + f;
    const Pack<T, vec> a = load<vec>(x), g = load<vec>(x + F);
    const Pack<T, vec> dh = load<vec>(static_cast<const T*>(args.dh) + row * F + f);
    Pack<T, vec> da, dg;
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      const float gate = widen(a.value[i]), upstream = widen(dh.value[i]);
      da.value[i] = narrow<T>(upstream * widen(g.value[i]) * Act::derivative(gate));
      dg.value[i] = narrow<T>(upstream * Act::value(gate));
    }
    T* dx = static_cast<T*>(args.dx) + row * 2 * F + f;
    store<vec>(dx, da);
    store<vec>(dx + F, dg);
  });
}

// Rows that give each thread about pieces_each pieces.
std::int64_t tile_rows_for(std::int64_t row_pieces) {
  const std::int64_t rows = threads * pieces_each / (row_pieces > 0 ? row_pieces : 1);
  return rows > 0 ? rows : 1;
}

template <class T, int vec, class Act>
void launch_kernel(Cuda device, const GluForward& args) {
  const std::int64_t tile = tile_rows_for(args.features / vec);
  launch("glu_fwd", glu_fwd_kernel<T, vec, Act>, device, static_cast<unsigned>(ceil_div(args.rows, tile)), threads, 0,
         args, static_cast<int>(tile));
}

template <class T, int vec, class Act>
void launch_kernel(Cuda device, const GluBackward& args) {
  const std::int64_t tile = tile_rows_for(args.features / vec);
  launch("glu_bwd", glu_bwd_kernel<T, vec, Act>, device, static_cast<unsigned>(ceil_div(args.rows, tile)), threads, 0,
         args, static_cast<int>(tile));
}

template <class Args>
void launch_for_type(Cuda device, const Args& args) {
  with_stored_type(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    constexpr int vec = 16 / sizeof(T);
    with_activation(args.activation, [&](auto activation) {
      using Act = decltype(activation);
      if (args.features % vec == 0) {
        launch_kernel<T, vec, Act>(device, args);
      } else {
        launch_kernel<T, 1, Act>(device, args);
      }
    });
  });
}

}  // namespace

void glu_fwd(Cuda device, const GluForward& args) { launch_for_type(device, args); }

void glu_bwd(Cuda device, const GluBackward& args) { launch_for_type(device, args); }

}  // namespace cramfast
