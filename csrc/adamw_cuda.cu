#include "adamw.h"

#include <cmath>

#include "device_code.h"

// Two launches and no atomics. The first sums the squares of each block's part of the gradient and copies the scalars;
// in the second every block adds those few partial sums in the same order, so all agree on the norm, and then updates
// its part. The copy lets block 0 advance the step while other blocks still read the old one.

namespace cramfast {
namespace {

constexpr int threads = 256, vec = 4, groups = 4;
constexpr std::int64_t chunk = threads * vec * groups;
constexpr int blocks_each = 4;  // on a multiprocessor, all there at once; each adds up a partial sum of each, from L2
constexpr int snapshot = 2;     // doubles behind the partial sums: lr, step, inverse_scale as floats

template <class T>
DEVICE T block_sum(T value, Shared<T> scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < threads / 32; ++warp) value += scratch[warp];
  return value;
}

// A float holds the squares of 16 values at a time, double all the rest: consumer cards have few double units.
// |g| beyond 1.8e19 counts as not finite.
__global__ void __launch_bounds__(threads, blocks_each)
    adamw_norm_kernel(const float* grad, std::int64_t size, double* partial, const float* scalars) {
  SHARED(double, sum_of_warp, threads / 32);
  double total = 0.0;
  for (std::int64_t begin = blockIdx.x * chunk; begin < size; begin += gridDim.x * chunk) {
    float square = 0.0f;
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const std::int64_t i = begin + (group * threads + static_cast<int>(threadIdx.x)) * vec;
      if (i + vec <= size) {
        const Pack<float, vec> g = load<vec>(grad + i);
#pragma unroll
        for (int j = 0; j < vec; ++j) square += g.value[j] * g.value[j];
      } else {
        for (std::int64_t j = i; j < size; ++j) square += grad[j] * grad[j];
      }
    }
    total += static_cast<double>(square);
  }
  total = block_sum<double>(total, sum_of_warp);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
  if (blockIdx.x == 0 && threadIdx.x < 3) {
    reinterpret_cast<float*>(partial + gridDim.x)[threadIdx.x] = scalars[threadIdx.x];
  }
}

// The same numbers for every element, from values on the device.
struct Step {
  float grad_factor, lr, rate, inverse_root;
  bool finite;
};

struct Constants {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float log_beta1, log_beta2;  // 1 - beta^t = -expm1(t log beta) keeps its digits in float32
  float max_norm;
};

DEVICE Step read_step(const AdamW& args, const Constants& constants, Shared<double> scratch) {
  const int partials = gridDim.x;
  double sum = 0.0;
  for (int i = threadIdx.x; i < partials; i += threads) sum += args.partial[i];
  sum = block_sum<double>(sum, scratch);
  const float* before = reinterpret_cast<const float*>(args.partial + partials);
  const float lr = before[0], count = before[1] + 1.0f, inverse_scale = before[2];
  const float norm = static_cast<float>(sqrt(sum) * static_cast<double>(inverse_scale));
  Step step{};
  step.finite = norm < INFINITY;  // false for NaN
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (step.finite) args.scalars[1] = count;
    args.scalars[3] = norm;
    args.scalars[4] = step.finite ? 0.0f : 1.0f;
  }
  const float clip = constants.max_norm > 0.0f ? fminf(1.0f, constants.max_norm / (norm + 1e-6f)) : 1.0f;
  step.grad_factor = clip * inverse_scale;
  step.lr = lr;
  step.rate = lr / -expm1f(count * constants.log_beta1);
  step.inverse_root = 1.0f / sqrtf(-expm1f(count * constants.log_beta2));
  return step;
}

// The first segment that ends behind element i.
DEVICE std::int64_t segment_of(const AdamW& args, std::int64_t i) {
  std::int64_t low = 0, high = args.segments - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (args.segment_end[middle] > i) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <class H, int count>
DEVICE void update(const AdamW& args, const Constants& c, const Step& step, std::int64_t i, std::int64_t segment) {
  const Pack<float, count> grad = load<count>(args.grad + i);
  Pack<float, count> p = load<count>(args.master + i), m = load<count>(args.exp_avg + i),
                     v = load<count>(args.exp_avg_sq + i);
  float decay = args.segment_decay[segment], share = args.segment_lr[segment];
  std::int64_t end = args.segment_end[segment];
  Pack<H, count> rounded;
#pragma unroll
  for (int j = 0; j < count; ++j) {
    while (i + j >= end) {  // rarely: a segment ends inside this piece
      ++segment;
      decay = args.segment_decay[segment];
      share = args.segment_lr[segment];
      end = args.segment_end[segment];
    }
    const float g = grad.value[j] * step.grad_factor;
    m.value[j] += c.one_minus_beta1 * (g - m.value[j]);
    v.value[j] = c.beta2 * v.value[j] + c.one_minus_beta2 * g * g;
    p.value[j] = p.value[j] * (1.0f - step.lr * share * decay) -
                 step.rate * share * m.value[j] / (sqrtf(v.value[j]) * step.inverse_root + c.eps);
    rounded.value[j] = narrow<H>(p.value[j]);
  }
  store<count>(args.master + i, p);
  store<count>(args.exp_avg + i, m);
  store<count>(args.exp_avg_sq + i, v);
  H* half = static_cast<H*>(args.half);
  if (i + count <= args.half_size) {
    store<count>(half + i, rounded);
  } else {
    for (int j = 0; j < count; ++j) {
      if (i + j < args.half_size) half[i + j] = rounded.value[j];
    }
  }
}

template <class H>
__global__ void __launch_bounds__(threads, blocks_each) adamw_kernel(AdamW args, Constants constants) {
  SHARED(double, sum_of_warp, threads / 32);
  const Step step = read_step(args, constants, sum_of_warp);
  if (!step.finite) return;
  for (std::int64_t begin = blockIdx.x * chunk; begin < args.size; begin += gridDim.x * chunk) {
    const std::int64_t first = segment_of(args, begin);
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const std::int64_t i = begin + (group * threads + static_cast<int>(threadIdx.x)) * vec;
      if (i >= args.size) break;
      // A chunk rarely crosses the end of a segment; only then does every thread look for its own.
      const std::int64_t segment = i < args.segment_end[first] ? first : segment_of(args, i);
      if (i + vec <= args.size) {
        update<H, vec>(args, constants, step, i, segment);
      } else {
        for (std::int64_t j = i; j < args.size; ++j) update<H, 1>(args, constants, step, j, segment_of(args, j));
      }
    }
  }
}

std::int64_t block_count(std::int64_t size) {
  const std::int64_t blocks = ceil_div(size, chunk), most = blocks_each * multiprocessors();
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

}  // namespace

std::int64_t adamw_partials(Cuda, std::int64_t size) { return block_count(size) + snapshot; }

void adamw(Cuda device, const AdamW& args) {
  const unsigned blocks = static_cast<unsigned>(block_count(args.size));
  Constants constants{};
  constants.one_minus_beta1 = static_cast<float>(1.0 - args.beta1);
  constants.beta2 = static_cast<float>(args.beta2);
  constants.one_minus_beta2 = static_cast<float>(1.0 - args.beta2);
  constants.eps = static_cast<float>(args.eps);
  constants.log_beta1 = static_cast<float>(std::log(args.beta1));
  constants.log_beta2 = static_cast<float>(std::log(args.beta2));
  constants.max_norm = static_cast<float>(args.max_norm);
  launch("adamw_norm", adamw_norm_kernel, device, blocks, threads, 0, args.grad, args.size, args.partial,
         static_cast<const float*>(args.scalars));
  if (args.half_dtype == DType::float16) {
    launch("adamw", adamw_kernel<f16>, device, blocks, threads, 0, args, constants);
  } else {
    launch("adamw", adamw_kernel<bf16>, device, blocks, threads, 0, args, constants);
  }
}

}  // namespace cramfast
