"""The C++ source of the CPU kernel's solver: scores in, attention maps out, a few dozen queries at a time.

Scores lie as (keys, queries), so that neighbouring queries fill a vector register and no sum runs across one. Newton's
method (entmax.py) stops as soon as every query of a tile has converged. Where r = 1/(alpha-1) is 1, 2, 3 or 4 (alpha 2,
1.5, 1.25; 4/3 is not exact in float32) no power function is needed; every other r below 9 starts from the thresholds of
the two whole ones next to it. Loops are written for the compiler to vectorise: no branch in an inner one.
"""

CPU_SOLVER = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr float kMasked = -3.0e38f;  // at or below: a masked key
constexpr float kTiny = 1.1754944e-38f;

// Vectors of GCC and Clang: any operation on them is on all lanes, in whatever registers the machine has. A tile of
// kRows x kWide of them is what a product accumulates in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 3;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

// exp(x) for x <= 80, to 2 ulp (Cephes' polynomial); zero below -87.7, where the exponent's bits become zero. The magic
// constant rounds to the nearest integer.
inline float exp_of(float x) {
  x = std::max(x, -88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float f = x - n * 0.693359375f;
  f += n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

// log(1 + d) for d > -1, to 2 ulp relative even where d is tiny (Cephes' polynomial).
inline float log1p_of(float d) {
  float u = 1.0f + d;
  u = std::max(u, 1.2e-38f);
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  bits -= e << 23;
  float m;
  std::memcpy(&m, &bits, 4);
  const float f = e == 0 ? d : m - 1.0f;
  const float z = f * f, n = (float)e;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z;
  y -= n * 2.12194440e-4f;
  y -= 0.5f * z;
  return f + y + n * 0.693359375f;
}

// (1 + d)^(r-1), zero for d <= -1. kWhole: r - 1 where it is 0, 1, 2 or 3; -1 for any other. Written as products, not
// as a choice: a branch would keep the compiler from vectorising.
template <int kWhole>
inline float power_of(float d, float r_minus_1) {
  const float p = std::max(1.0f + d, 0.0f);
  const float inside = std::min(p * 1.0e30f, 1.0f);  // p = 1 + d is zero or at least 6e-8
  if (kWhole == 0) return inside;
  if (kWhole == 1) return p;
  if (kWhole == 2) return p * p;
  if (kWhole == 3) return p * p * p;
  if (kWhole > 3) return 0.0f;
  return inside * exp_of(r_minus_1 * log1p_of(d));
}

// Raise `lift` (one per lane) by Newton's method on ||relu(x - t)||_r = 1, lift = t + 1, x = z / r, until the sums are
// one to `tolerance` or `steps` are done. Leaves sum p^r in `sum` and sum p^(r-1) in `slope`, both at the last lift,
// and, where a power is dear, p^(r-1) of every score in `powers`.
template <int kWhole, int W>
void newton(const float* __restrict z, int64_t keys, float r, int steps, float tolerance, float* __restrict lift,
            float* __restrict sum, float* __restrict slope, float* __restrict powers) {
  const float alpha_minus_1 = 1.0f / r, r_minus_1 = r - 1.0f;
  for (int step = 0;; step++) {
    for (int j = 0; j < W; j++) sum[j] = slope[j] = 0.0f;
    for (int64_t k = 0; k < keys; k++) {
      for (int j = 0; j < W; j++) {
        const float d = z[k * W + j] * alpha_minus_1 - lift[j];
        const float q = power_of<kWhole>(d, r_minus_1);
        if (kWhole < 0) powers[k * W + j] = q;
        slope[j] += q;
        sum[j] += q * std::max(1.0f + d, 0.0f);
      }
    }
    float worst = 0.0f;
    for (int j = 0; j < W; j++) worst = std::max(worst, std::fabs(sum[j] - 1.0f));
    if (worst <= tolerance || step == steps) return;
    for (int j = 0; j < W; j++) {
      // (N - 1) N^(r-1) / sum p^(r-1), N = sum^(1/r). From the right of the root (a guess may lie there) it steps back.
      const float s = std::max(sum[j], 1.0e-6f);
      float norm;
      if (kWhole == 0) {
        norm = s;
      } else if (kWhole == 1) {
        norm = std::sqrt(s);
      } else {
        norm = exp_of(log1p_of(s - 1.0f) * alpha_minus_1);
      }
      const float rise = (norm - 1.0f) * s / norm;
      lift[j] = std::max(0.0f, lift[j] + rise / std::max(slope[j], 1.0e-6f));
    }
  }
}

template <int W>
void whole(const float* z, int64_t keys, int r_minus_1, int steps, float tolerance, float* lift, float* sum,
           float* slope) {
  for (int j = 0; j < W; j++) lift[j] = 0.0f;
  switch (r_minus_1) {
    case 0: return newton<0, W>(z, keys, 1.0f, steps, tolerance, lift, sum, slope, nullptr);
    case 1: return newton<1, W>(z, keys, 2.0f, steps, tolerance, lift, sum, slope, nullptr);
    case 2: return newton<2, W>(z, keys, 3.0f, steps, tolerance, lift, sum, slope, nullptr);
    default: return newton<3, W>(z, keys, 4.0f, steps, tolerance, lift, sum, slope, nullptr);
  }
}

// The lift at which row-wise (1 + z/r - lift)^r sums to one.
template <int W>
int solve(const float* z, int64_t keys, float r, int steps, float* lift, float* sum, float* slope, float* powers) {
  // A step in the weights follows, which squares what is left of the residual; only keys within
  // delta = |sum - 1| / (r slope) of the threshold, slope >= 1, are off by up to delta^r.
  const float tolerance = std::min(3.0e-4f, r * std::pow(3.0e-7f, 1.0f / r));
  const int below = (int)r;
  if ((float)below == r && below <= 4) {
    whole<W>(z, keys, below - 1, steps, tolerance, lift, sum, slope);
    return below - 1;
  }
  if (r < 9.0f) {
    // The threshold in units of z is nearly linear in r between, and a little beyond, two whole ones.
    alignas(64) float upper[W];
    const int first = std::min(below, 3);
    whole<W>(z, keys, first - 1, 4, 1.0e-2f, lift, sum, slope);
    whole<W>(z, keys, first, 4, 1.0e-2f, upper, sum, slope);
    const float weight = r - (float)first;
    for (int j = 0; j < W; j++) {
      const float low = lift[j] * (float)first, high = upper[j] * (float)(first + 1);
      lift[j] = std::max(0.0f, (low + weight * (high - low)) / r);
    }
  } else {
    for (int j = 0; j < W; j++) lift[j] = 0.0f;
  }
  newton<-1, W>(z, keys, r, steps, tolerance, lift, sum, slope, powers);
  return -1;
}

constexpr int kSoftmax = 4;  // for kWhole: alpha = 1, whose map is the dense one

// The maps from the solved tile: mixed = w_dense * dense + w_sparse * sparse, and sparse alone where it is asked for.
template <int kWhole, int W>
void write_maps(const float* __restrict z, int64_t keys, float r, const float* __restrict lift,
                const float* __restrict sum, const float* __restrict slope, const float* __restrict total,
                float w_dense, float w_sparse, const float* powers, float* mixed, float* sparse_out) {
  const float alpha_minus_1 = 1.0f / r, r_minus_1 = r - 1.0f;
  alignas(64) float correction[W], inverse[W], sparse[W], both[W];
  for (int j = 0; j < W; j++) {
    inverse[j] = total[j] > 0.0f ? 1.0f / total[j] : 0.0f;
    // One more Newton step, in the weights: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
    correction[j] = slope[j] > 0.0f ? (1.0f - sum[j]) / slope[j] : 0.0f;
  }
  for (int64_t k = 0; k < keys; k++) {
    for (int j = 0; j < W; j++) {
      const float score = z[k * W + j];
      const float d = score * alpha_minus_1 - lift[j];
      const float dense = exp_of(score) * inverse[j];
      const float q = kWhole < 0 ? powers[k * W + j] : power_of<kWhole>(d, r_minus_1);
      sparse[j] = kWhole == kSoftmax ? dense : std::max(q * (std::max(1.0f + d, 0.0f) + correction[j]), 0.0f);
      both[j] = w_dense * dense + w_sparse * sparse[j];
    }
    std::memcpy(mixed + k * W, both, sizeof(both));
    if (sparse_out) std::memcpy(sparse_out + k * W, sparse, sizeof(sparse));
  }
}

// Solve and write the maps of scores that are less their row's largest and over temperature; total: their sum of exp.
template <int W>
void maps_of(const float* z, int64_t keys, float alpha, int steps, const float* total, float w_dense, float w_sparse,
             float* powers, float* mixed, float* sparse) {
  alignas(64) float lift[W], sum[W], slope[W];
  const float r = 1.0f / std::max(alpha - 1.0f, 1.1920929e-7f);
  if ((w_sparse == 0.0f && !sparse) || alpha - 1.0f < 2.4e-7f) {  // dense attention alone: nothing to solve
    for (int j = 0; j < W; j++) lift[j] = sum[j] = slope[j] = 0.0f;
    return write_maps<kSoftmax, W>(z, keys, r, lift, sum, slope, total, w_dense, w_sparse, nullptr, mixed, sparse);
  }
  switch (solve<W>(z, keys, r, steps, lift, sum, slope, powers)) {
#define WRITE(whole) \
  write_maps<whole, W>(z, keys, r, lift, sum, slope, total, w_dense, w_sparse, powers, mixed, sparse)
    case 0: return WRITE(0);
    case 1: return WRITE(1);
    case 2: return WRITE(2);
    case 3: return WRITE(3);
    default: return WRITE(-1);
#undef WRITE
  }
}

}  // namespace
"""
