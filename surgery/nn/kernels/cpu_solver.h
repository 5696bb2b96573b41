// The CPU kernel's solver, from scores to attention maps.
//
// Scores lie as (keys, queries), so that neighbouring queries fill a register and no sum runs across one. Newton's
// method on the norm (entmax.py), sped up by inverse cubics, stops when the queries of two registers have converged.
// Where r, that is 1/(alpha-1), is 1, 2, 3 or 4 (4/3 is not exact in float32) no power function is needed. Any other
// under 4 starts from where a polynomial in its place has its root, a larger one from a bound.

#include "cpu_product.h"

namespace {

// Steps of V vectors at once, side by side: each step has to wait for the one before it.
#define EACH(v) _Pragma("GCC unroll 4") for (int v = 0; v < V; v++)

// 2^x for x <= 120, to 2 ulp; zero below -126.5, NaN for NaN. The magic constant rounds to the nearest integer.
template <int V>
inline void to_exp2(Vector (&x)[V]) {
  Vector y[V], power[V];
  EACH(v) {
    x[v] = larger(all(-127.0f), x[v]);
    const Vector shifted = x[v] + 12582912.0f;
    x[v] = x[v] - (shifted - 12582912.0f);
    power[v] = (Vector)(((Integers)shifted + 127) << 23);
  }
  EACH(v) y[v] = x[v] * 1.3276476e-3f + 9.6755419e-3f;
  EACH(v) y[v] = y[v] * x[v] + 5.5507131e-2f;
  EACH(v) y[v] = y[v] * x[v] + 2.40221202e-1f;
  EACH(v) y[v] = y[v] * x[v] + 6.93146944e-1f;
  EACH(v) y[v] = y[v] * x[v] + 1.00000012f;
  EACH(v) x[v] = y[v] * power[v];
}

// log2(x) in place of d = x - 1, to 2e-7 of itself even where d is tiny; some number for x <= 0.
template <int V>
inline void to_log2(const Vector (&x)[V], Vector (&d)[V]) {
  Vector y[V], exponent[V];
  EACH(v) {
    const Integers bits = (Integers)x[v], e = (bits - 0x3f3504f3) >> 23;
    const Vector f = (Vector)(bits - (e << 23)) - 1.0f;
    d[v] = e == 0 ? d[v] : f;
    exponent[v] = __builtin_convertvector(e, Vector);
  }
  EACH(v) y[v] = d[v] * -1.45811588e-1f + 2.34042421e-1f;
  EACH(v) y[v] = y[v] * d[v] - 2.48876914e-1f;
  EACH(v) y[v] = y[v] * d[v] + 2.87098706e-1f;
  EACH(v) y[v] = y[v] * d[v] - 3.60239625e-1f;
  EACH(v) y[v] = y[v] * d[v] + 4.80923235e-1f;
  EACH(v) y[v] = y[v] * d[v] - 7.21352816e-1f;
  EACH(v) y[v] = y[v] * d[v] + 1.4426949f;
  EACH(v) d[v] = y[v] * d[v] + exponent[v];
}

inline Vector exp2_of(Vector x) {
  Vector one[1] = {x};
  return to_exp2<1>(one), one[0];
}
inline Vector log2_of(Vector x) {
  Vector one[1] = {x}, less[1] = {x - 1.0f};
  return to_log2<1>(one, less), less[0];
}

// The thresholds of kLanes x V rows, and of each the sums of p^r and p^(r-1) there: p = z c + height where positive,
// c = unit / r, z scores in units of log2 less their row's largest, unit ln 2 over the temperature of the sparse map.
// The largest p is the height, and all are small in a flat row: it is what has to be exact. A large r takes all of them
// near one, and is solved for height - 1.
template <int V>
struct Rows {
  Vector height[V], sum[V], slope[V];
};

constexpr int kSmall = -1, kLarge = -2;  // any r under, and over, 4
constexpr int kFitted = -3;              // any r under 4, with Fit in the place of the power

// p^(r-1) where r - 1 = kWhole is 0, 1, 2 or 3.
template <int kWhole>
inline Vector power_of(Vector p) {
  if constexpr (kWhole == 0) return p > 0.0f ? all(1.0f) : Vector{};
  return kWhole == 1 ? p : kWhole == 2 ? p * p : p * p * p;
}

constexpr int64_t kSummedAtOnce = 32;
constexpr int kFittedSteps = 5;

// t^r over [0, 1] as a polynomial c0 t + c1 t^2 + ... that is 1 at 1: least squares, whose normal equations are a
// Cauchy matrix's.
struct Fit {
  static constexpr int kTerms = 4;
  float c[kTerms];

  explicit Fit(float r) {
    double sum = 0.0, of[kTerms];
    for (int j = 1; j <= kTerms; j++) {
      double part = (2.0 * j + 1.0) / (r + j + 1.0);
      for (int i = 1; i <= kTerms; i++)
        if (i != j) part *= (i + j + 1.0) * (r - i) / ((r + i + 1.0) * (j - i));
      sum += of[j - 1] = part;
    }
    for (int j = 0; j < kTerms; j++) c[j] = (float)(of[j] / sum);
  }
};

// As evaluate, to 1 in 50: p^r is height^r t^r, t = p / height.
template <int W, int V>
inline void evaluate_fit(const float* z, int64_t keys, float r, float unit, Rows<V>& rows, const Fit& fit) {
  constexpr int kLast = Fit::kTerms - 1;
  Vector c[V], sum[V]{}, slope[V]{};
  EACH(v) c[v] = unit / r / rows.height[v];
  for (int64_t k = 0; k < keys; k++) {
    Vector t[V], y[V], d[V];
    EACH(v) t[v] = larger(load(z + k * W + v * kLanes) * c[v] + 1.0f, Vector{});
    EACH(v) y[v] = all(fit.c[kLast]), d[v] = all(fit.c[kLast] * (kLast + 1));
#pragma GCC unroll 4
    for (int j = kLast - 1; j >= 0; j--) {
      EACH(v) y[v] = y[v] * t[v] + fit.c[j];
      EACH(v) d[v] = d[v] * t[v] + fit.c[j] * (j + 1);
    }
    EACH(v) sum[v] += y[v] * t[v];
    EACH(v) slope[v] += t[v] > 0.0f ? d[v] : Vector{};
  }
  EACH(v) {
    const Vector power = exp2_of(log2_of(rows.height[v]) * (r - 1.0f));
    rows.sum[v] = sum[v] * power * rows.height[v], rows.slope[v] = slope[v] * power * (1.0f / r);
  }
}

// kWhole: as above, or kSmall or kLarge for any other r.
template <int kWhole, int W, int V>
inline void evaluate(const float* z, int64_t keys, float r, float unit, Rows<V>& rows, float* powers) {
  const float c = unit / r, r_minus_1 = r - 1.0f;
  Vector height[V];
  for (int v = 0; v < V; v++) height[v] = rows.height[v], rows.sum[v] = rows.slope[v] = Vector{};
  for (int64_t k = 0; k < keys;) {
    Vector sum[V]{}, slope[V]{};  // of a few keys: added to the whole one at a time, small terms would lose digits
    for (const int64_t end = std::min(k + kSummedAtOnce, keys); k < end; k++) {
      Vector d[V], p[V], q[V];
      EACH(v) d[v] = load(z + k * W + v * kLanes) * c + height[v];
      EACH(v) p[v] = larger(kWhole == kLarge ? d[v] + 1.0f : d[v], Vector{});
      if constexpr (kWhole < 0) {
        if constexpr (kWhole == kSmall)
          EACH(v) d[v] = p[v] - 1.0f;
        to_log2<V>(p, d);
        EACH(v) d[v] *= r_minus_1;
        to_exp2<V>(d);
        EACH(v) store(powers + k * W + v * kLanes, q[v] = p[v] > 0.0f ? d[v] : Vector{});
      } else {
        EACH(v) q[v] = power_of<kWhole>(p[v]);
      }
      EACH(v) slope[v] += q[v];
      EACH(v) sum[v] += q[v] * p[v];
    }
    for (int v = 0; v < V; v++) rows.sum[v] += sum[v], rows.slope[v] += slope[v];
  }
}

inline float largest_of(Vector x) {
  for (int l = 1; l < kLanes; l++) x[0] = std::max(x[0], x[l]);
  return x[0];
}

// total^(-1/r), or that less 1 where r > 4, of the sum `total` of a row's exp: no height is smaller, and none larger
// where all scores are equal. A little less, to be so in spite of rounding; as a series where digits would be lost.
inline Vector lowest_of(float r, Vector log_total) {
  const Vector x = log_total * (1.0f / r);
  if (r >= 64.0f) return -x * (1.0f - x * (1.0f / 2) * (1.0f - x * (1.0f / 3) * (1.0f - x * (1.0f / 4))));
  return r > 4.0f ? exp2_of(x * -kLog2e) - 1.000001f : exp2_of(x * -kLog2e) * 0.999999f;
}

constexpr float kEnough = 3.0e-4f;  // of a residual that the step in the weights squares

// Newton's method on N = ||relu(z c + height)||_r = 1, until every sum is one to `tolerance` for a slope of 1, or as
// nearly as a float32 height can make it, or `steps` are done. N is convex: a step ends above its root wherever it
// starts. Later ones go below that by what the inverse cubic through the last two norms and slopes says, at most as
// far again. Where many keys leave the support at once the slope jumps: this can lead far below the root, from there
// a step far above it, and so for ever. So no height is above an earlier end, or below one that was too small: two
// steps gain what one of plain Newton would. From an end that is too low, by rounding, the next goes back by a
// quarter of its step.
template <int kWhole, int W, int V>
void newton(const float* z, int64_t keys, float r, float unit, int steps, float tolerance, const Vector* log_total,
            Rows<V>& rows, float* powers) {
  const Fit fit(r);  // which kFitted alone reads
  const Vector highest = all(kWhole == kLarge ? 0.0f : 1.0f);
  // Height, N - 1 and d height / d N of the last step; the least height, the largest too small, and the lowest end.
  Vector before[V], off_before[V]{}, inverse_before[V]{}, lowest[V], least[V], most[V];
  for (int v = 0; v < V; v++) {
    before[v] = lowest[v] = least[v] = lowest_of(r, log_total[v]), most[v] = highest;
    rows.height[v] = larger(rows.height[v], lowest[v]);
  }
  for (int step = 0;; step++) {
    if constexpr (kWhole == kFitted)
      evaluate_fit<W, V>(z, keys, r, unit, rows, fit);
    else
      evaluate<kWhole, W, V>(z, keys, r, unit, rows, powers);
    Vector worst{};
    for (int v = 0; v < V; v++) {
      const Vector off = rows.sum[v] - 1.0f, resolved = kWhole == kLarge ? all(1.0f) : rows.height[v];
      const Vector enough = larger(smaller(rows.slope[v] * tolerance, all(kEnough)), all(tolerance));
      const Vector left = larger(off, -off) - larger(enough, rows.slope[v] * resolved * (r * 1.5e-7f));
      worst = larger(rows.slope[v] > 0.0f ? left : Vector{}, worst);
    }
    if (step == steps || !(largest_of(worst) > 0.0f)) return;
    for (int v = 0; v < V; v++) {
      const Vector s = larger(rows.sum[v], all(1.0e-6f));
      const Vector norm = kWhole == 0 ? s : exp2_of(log2_of(s) * (1.0f / r));
      const Vector off = norm - 1.0f, inverse = s / (norm * larger(rows.slope[v], all(1.0e-6f)));
      const Vector height = rows.height[v], fall = off * inverse, end = height - fall;
      Vector beyond{};
      if (step > 0) {
        const Vector apart = off_before[v] - off;
        const Vector i = apart * apart > 1.0e-8f ? 1.0f / apart : Vector{};
        const Vector secant = (before[v] - height) * i;
        beyond = off * off * i * (inverse - secant - off_before[v] * i * (2.0f * secant - inverse - inverse_before[v]));
        beyond = larger(smaller(beyond, larger(fall, -fall)), Vector{});
      }
      const Vector back = height + larger(height, -height) * 1.0e-7f + (before[v] - height) * 0.25f;
      const Vector again = smaller(end, before[v] > height ? back : highest);
      most[v] = (off < 0.0f) & (height >= most[v]) ? again : smaller(end, most[v]);
      least[v] = off < 0.0f ? larger(height, least[v]) : least[v];
      before[v] = height, off_before[v] = off, inverse_before[v] = inverse;
      rows.height[v] = smaller(larger(end - (end - beyond > least[v] ? beyond : Vector{}), lowest[v]), most[v]);
    }
  }
}

// Find the heights. Returns r - 1 if 0, 1, 2 or 3; else kSmall or kLarge, with p^(r-1) of every score in `powers`.
template <int W, int V>
int solve(const float* z, int64_t keys, float r, float unit, int steps, const Vector* log_total, Rows<V>& rows,
          float* powers) {
  // A step in the weights follows, which squares what is left of the residual; only keys within
  // delta = |sum - 1| / (r slope) of the threshold, slope >= 1, are off by up to delta^r. Sums are exact to about 1e-6.
  const float exact = r * std::pow(5.0e-6f / (float)keys, 1.0f / r), tolerance = std::clamp(exact, 1.0e-6f, kEnough);
  const int below = (int)r;
  for (int v = 0; v < V; v++) rows.height[v] = all(1.0f);
  if ((float)below == r && below <= 4) {
    const auto few = below == 1 ? newton<0, W, V> : newton<1, W, V>;
    const auto many = below == 3 ? newton<2, W, V> : newton<3, W, V>;
    (below < 3 ? few : many)(z, keys, r, unit, steps, tolerance, log_total, rows, powers);
    return below - 1;
  }
  if (r > 4.0f) {  // starts from the lowest
    for (int v = 0; v < V; v++) rows.height[v] = all(-1.0f);
    newton<kLarge, W, V>(z, keys, r, unit, steps, tolerance, log_total, rows, powers);
    return kLarge;
  }
  newton<kFitted, W, V>(z, keys, r, unit, kFittedSteps, 1.0e-2f, log_total, rows, powers);
  newton<kSmall, W, V>(z, keys, r, unit, steps, tolerance, log_total, rows, powers);
  return kSmall;
}

// to = to * w_to + w_sparse * sparse map; the sparse map alone in sparse_to where that is asked for.
template <int kWhole, int W, int V>
void write_maps(const float* z, int64_t keys, float r, float unit, const Rows<V>& rows, const Vector* w_to,
                const Vector* w_sparse, const Vector* w_alone, const float* powers, float* to, float* sparse_to) {
  const float c = unit / r;
  Vector correction[V];
  // One more Newton step, in the weights: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
  for (int v = 0; v < V; v++) correction[v] = rows.slope[v] > 0.0f ? (1.0f - rows.sum[v]) / rows.slope[v] : Vector{};
  for (int64_t k = 0; k < keys; k++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t at = k * W + v * kLanes;
      const Vector d = load(z + at) * c + rows.height[v];
      const Vector p = larger(kWhole == kLarge ? d + 1.0f : d, Vector{});
      const Vector q = kWhole < 0 ? load(powers + at) : power_of<kWhole>(p);
      const Vector sparse = larger(q * (p + correction[v]), Vector{});
      store(to + at, load(to + at) * w_to[v] + w_sparse[v] * sparse);
      if (sparse_to) store(sparse_to + at, sparse * w_alone[v]);
    }
  }
}

// As maps_of where alpha is 1 but the temperature is not: the sparse map is a softmax of its own.
template <int W, int V>
void softmax_maps(const float* z, int64_t keys, float over, const Vector* w_to, const Vector* w_sparse,
                  const Vector* w_alone, float* to, float* sparse_to) {
  Vector sum[V]{};
  for (int64_t k = 0; k < keys; k++) {
    Vector e[V];
    EACH(v) e[v] = load(z + k * W + v * kLanes) * over;
    to_exp2<V>(e);
    EACH(v) sum[v] += e[v];
  }
  EACH(v) sum[v] = sum[v] == 0.0f ? Vector{} : 1.0f / sum[v];
  for (int64_t k = 0; k < keys; k++) {
    Vector e[V];
    EACH(v) e[v] = load(z + k * W + v * kLanes) * over;
    to_exp2<V>(e);
    EACH(v) {
      const int64_t at = k * W + v * kLanes;
      const Vector sparse = e[v] * sum[v];
      store(to + at, load(to + at) * w_to[v] + w_sparse[v] * sparse);
      if (sparse_to) store(sparse_to + at, sparse * w_alone[v]);
    }
  }
}

// `to` holds each score's exp on entry, and weights of the values on return: if `divide`, w_dense of what it held over
// its sum `total`, else just that, plus w_sparse of the sparse map. That alone goes to sparse_to where it is asked for;
// sparse_to may be z.
template <int W, int V>
void maps_of(const float* z, int64_t keys, float alpha, float over, int steps, const float* total, float w_dense,
             float w_sparse, bool divide, float* powers, float* to, float* sparse_to) {
  Rows<V> rows;
  Vector inverse[V], w_to[V], w_alone[V], w_s[V], log_total[V];
  const float r = 1.0f / std::max(alpha - 1.0f, 1.1920929e-7f);
  const bool alike = alpha - 1.0f < 2.4e-7f, dense = (w_sparse == 0.0f && !sparse_to) || (alike && over == 1.0f);
  for (int v = 0; v < V; v++) {
    const Vector t = load(total + v * kLanes);
    inverse[v] = t == 0.0f ? Vector{} : 1.0f / t;  // a row without keys is zeros, one with a NaN is NaN
    // Sharper scores have a smaller sum of exp, which bounds the heights all the same; flatter ones have keys at most.
    log_total[v] = log2_of(over < 1.0f ? all((float)keys) : larger(t, all(1.0f))) * kLn2;
    w_to[v] = divide ? inverse[v] * (dense ? w_dense + w_sparse : w_dense) : all(1.0f);
    w_alone[v] = inverse[v] * 0.0f + 1.0f;
    w_s[v] = w_alone[v] * w_sparse;
  }
  if (dense) {
    for (int64_t k = 0; k < keys; k++)
      for (int64_t v = 0, at = k * W; v < V; v++, at += kLanes) {
        if (sparse_to) store(sparse_to + at, load(to + at) * inverse[v]);
        store(to + at, load(to + at) * w_to[v]);
      }
    return;
  }
  if (alike) return softmax_maps<W, V>(z, keys, over, w_to, w_s, w_alone, to, sparse_to);
  const float unit = kLn2 * over;
  switch (solve<W, V>(z, keys, r, unit, steps, log_total, rows, powers)) {
#define WRITE(whole) return write_maps<whole, W, V>(z, keys, r, unit, rows, w_to, w_s, w_alone, powers, to, sparse_to)
    case 0: WRITE(0);
    case 1: WRITE(1);
    case 2: WRITE(2);
    case 3: WRITE(3);
    case kSmall: WRITE(kSmall);
    default: WRITE(kLarge);
#undef WRITE
  }
}

}  // namespace
