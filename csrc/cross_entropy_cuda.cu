#include "cross_entropy.h"

#include "device_code.h"

// One block for each row. Up to 32,768 half-precision or 16,384 float32 logits a row stays packed in the registers of
// 512 threads, two blocks on a multiprocessor: one read, one write. Twice that still fits, with one block. Beyond, or
// where 16 bytes do not divide a row, the row is read three times, mostly from the L2 cache.

namespace cramfast {
namespace {

constexpr int threads = 512, block_warps = threads / 32;

DEVICE float block_max(float value, Shared<float> scratch) {
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < block_warps; ++warp) value = fmaxf(value, scratch[warp]);
  return value;
}

DEVICE float block_sum(float value, Shared<float> scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int warp = 0; warp < block_warps; ++warp) value += scratch[warp];
  return value;
}

// pieces > 0: the row in registers; pieces = 0: read again for each pass.
template <class T, int vec, int pieces>
struct Row {
  Pack<T, vec> kept[pieces > 0 ? pieces : 1];
  T* z;
  int V;

  // f(pack, first index) for every pack of this thread.
  template <class F>
  DEVICE void each(const F& f) {
    if constexpr (pieces > 0) {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        const int v = (p * threads + static_cast<int>(threadIdx.x)) * vec;
        if (v < V) f(kept[p], v);
      }
    } else {
      for (int v = static_cast<int>(threadIdx.x) * vec; v < V; v += threads * vec) {
        Pack<T, vec> pack = load<vec>(z + v);
        f(pack, v);
      }
    }
  }

  DEVICE void read() {
    if constexpr (pieces > 0) {
      each([&](Pack<T, vec>& pack, int v) { pack = load<vec>(z + v); });
    }
  }
};

// A target beyond the vocabulary would be read outside the logits; the host cannot look without waiting for the device.
// In a kernel of its own, as for attention's offsets: the rows' kernel does not run once this one has trapped, and does
// not pay for printf.
__global__ void __launch_bounds__(threads) cross_entropy_check_kernel(CrossEntropy args) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (row >= args.rows || args.target[row] < args.vocabulary) return;
  const long long target = args.target[row], vocabulary = args.vocabulary;  // printf's
  stop("cross_entropy: target %lld is outside the vocabulary of %lld\n", target, vocabulary);
}

template <class T, int vec, int pieces>
__global__ void __launch_bounds__(threads, pieces <= 8 ? 2 : 1) cross_entropy_kernel(CrossEntropy args) {
  SHARED(float, largest_of_warp, block_warps);
  SHARED(float, sum_of_warp, block_warps);
  const std::int64_t index = blockIdx.x, target = args.target[index];
  Row<T, vec, pieces> row;
  row.V = static_cast<int>(args.vocabulary);
  row.z = static_cast<T*>(args.logits) + index * args.vocabulary;
  if (target < 0) {  // the same for the whole block
    if (threadIdx.x == 0) args.loss[index] = 0.0f;
    if (args.write_gradient) row.each([&](Pack<T, vec>&, int v) { store<vec>(row.z + v, Pack<T, vec>{}); });
    return;
  }
  row.read();
  float largest = -INFINITY;
  row.each([&](Pack<T, vec>& pack, int) {
#pragma unroll
    for (int i = 0; i < vec; ++i) largest = fmaxf(largest, widen(pack.value[i]));
  });
  const float at_target = widen(row.z[target]);  // before the barriers, so before anyone writes the gradient
  largest = block_max(largest, largest_of_warp);
  float sum = 0.0f;
  row.each([&](Pack<T, vec>& pack, int) {
    compute_again(pack);
#pragma unroll
    for (int i = 0; i < vec; ++i) sum += expf(widen(pack.value[i]) - largest);
  });
  // largest + log(sum) would round away digits that all probabilities of the row share: keep the two apart.
  sum = block_sum(sum, sum_of_warp);
  const float log_sum = logf(sum), lse = largest + log_sum;
  if (threadIdx.x == 0) args.loss[index] = log_sum + (largest - at_target) + args.z_loss * lse * lse;
  if (!args.write_gradient) return;
  const float factor = (1.0f + 2.0f * args.z_loss * lse) / sum;
  row.each([&](Pack<T, vec>& pack, int v) {
    compute_again(pack);
#pragma unroll
    for (int i = 0; i < vec; ++i) {
      const float slope = expf(widen(pack.value[i]) - largest) * factor;
      pack.value[i] = narrow<T>((v + i == target ? slope - 1.0f : slope) * args.gain);
    }
    store<vec>(row.z + v, pack);
  });
}

template <class T, int vec, int pieces>
void launch_kernel(Cuda device, const CrossEntropy& args) {
  launch("cross_entropy", cross_entropy_kernel<T, vec, pieces>, device, static_cast<unsigned>(args.rows), threads, 0,
         args);
}

}  // namespace

void cross_entropy(Cuda device, const CrossEntropy& args) {
  launch("cross_entropy_check", cross_entropy_check_kernel, device,
         static_cast<unsigned>((args.rows + threads - 1) / threads), threads, 0, args);
  with_stored_type(args.dtype, [&](auto* stored) {
    using T = std::remove_pointer_t<decltype(stored)>;
    constexpr int vec = 16 / sizeof(T), once = threads * vec;
    const std::int64_t V = args.vocabulary;
    if (V % vec != 0) return launch_kernel<T, 1, 0>(device, args);
    if (V <= once) return launch_kernel<T, vec, 1>(device, args);
    if (V <= 2 * once) return launch_kernel<T, vec, 2>(device, args);
    if (V <= 4 * once) return launch_kernel<T, vec, 4>(device, args);
    if (V <= 8 * once) return launch_kernel<T, vec, 8>(device, args);
    if (V <= 16 * once) return launch_kernel<T, vec, 16>(device, args);
    launch_kernel<T, vec, 0>(device, args);
  });
}

}  // namespace cramfast
