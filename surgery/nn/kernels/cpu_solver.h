// The CPU kernel's arithmetic: products, and the solver from scores to attention maps.
//
// Products are summed in registers, by a broadcast and multiply-adds. Scores lie as (keys, queries), so that
// neighbouring queries fill a register and no sum runs across one. Newton's method on the norm (entmax.py), sped up by
// inverse cubics, stops when the queries of two registers have converged. Where r, that is 1/(alpha-1), is 1, 2, 3 or 4
// (4/3 is not exact in float32) no power function is needed. Any other starts from the thresholds of the two next to
// it, or from a bound.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// Vectors of GCC and Clang: any operation on them is on all lanes, in whatever registers the machine has. MAX and MIN
// (b where either is NaN) are written out where GCC makes no single instruction of a comparison. IN_REGISTER keeps it
// from reading a vector from memory at each use: two loads a cycle are fewer than the multiply-adds.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24;
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__AVX__)
constexpr int kLanes = 8, kAccumulators = 12;
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define IN_REGISTER(x) asm("" : "+x"(x))
#else
constexpr int kLanes = 4, kAccumulators = 12;
#define MAX(a, b) a > b ? a : b
#define MIN(a, b) a < b ? a : b
#define IN_REGISTER(x)
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr float kLn2 = 0.693147181f, kLog2e = 1.44269504f;
constexpr float kFar = -1.0e9f;  // scores are at least this far below their row's largest: nothing, at any alpha

inline Vector all(float x) { return Vector{} + x; }
inline Vector load(const float* p) { return *(const Vector*)p; }
inline void store(float* p, Vector x) { *(Vector*)p = x; }
inline Vector larger(Vector a, Vector b) { return MAX(a, b); }
inline Vector smaller(Vector a, Vector b) { return MIN(a, b); }

// out[i][j] = sum over t of left[i * across + t * along] * right[t * right_n + j], of R rows i and V vectors j; added
// to what is there if `more`. R x V sums stay in registers.
template <int R, int V>
inline void product_tile(const float* left, int64_t across, int64_t along, int64_t length, const float* right,
                         int64_t right_n, float* out, int64_t out_n, bool more) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = more ? load(out + r * out_n + v * kLanes) : Vector{};
  for (int64_t t = 0; t < length; t++) {
    // The fewer of the factors and vectors are held in registers, and one of the others.
    if constexpr (R <= V) {
      Vector factor[R];
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) factor[r] = all(left[r * across + t * along]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        Vector row = load(right + t * right_n + v * kLanes);
        IN_REGISTER(row);
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) sum[r][v] += factor[r] * row;
      }
    } else {
      Vector row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        row[v] = load(right + t * right_n + v * kLanes);
        IN_REGISTER(row[v]);
      }
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const Vector factor = all(left[r * across + t * along]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] += factor * row[v];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(out + r * out_n + v * kLanes, sum[r][v]);
}

template <int V>
void product_columns(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
                     int64_t right_n, float* out, int64_t out_n, bool more) {
  constexpr int R = std::min(kAccumulators / V, 12);
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    product_tile<R, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
  for (; i + 2 <= rows; i += 2)
    product_tile<2, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
  if (i < rows)
    product_tile<1, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
}

// As product_tile, of `rows` rows and `columns` vectors.
void product(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
             int64_t right_n, int64_t columns, float* out, int64_t out_n, bool more) {
  for (int64_t width; columns > 0; columns -= width, right += width * kLanes, out += width * kLanes) {
    width = columns == 5 ? 3 : std::min<int64_t>(columns, 4);
    if (width == 1) product_columns<1>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 2) product_columns<2>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 3) product_columns<3>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 4) product_columns<4>(left, across, along, rows, length, right, right_n, out, out_n, more);
  }
}

// to[c * to_n + j] = from[j * from_n + c] * scale of 8 rows and columns.
inline void transpose(const float* from, int64_t from_n, float scale, float* to, int64_t to_n) {
#if defined(__AVX__)
  __m256 m[8], n[8];
  for (int j = 0; j < 8; j++) m[j] = _mm256_loadu_ps(from + j * from_n) * _mm256_set1_ps(scale);
  for (int j = 0; j < 8; j += 2)
    n[j] = _mm256_unpacklo_ps(m[j], m[j + 1]), n[j + 1] = _mm256_unpackhi_ps(m[j], m[j + 1]);
  for (int j = 0; j < 8; j += 4) {
    for (int i = 0; i < 2; i++) {
      m[j + 2 * i] = _mm256_shuffle_ps(n[j + i], n[j + i + 2], 0x44);
      m[j + 2 * i + 1] = _mm256_shuffle_ps(n[j + i], n[j + i + 2], 0xee);
    }
  }
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(to + c * to_n, _mm256_permute2f128_ps(m[c], m[c + 4], 0x20));
    _mm256_storeu_ps(to + (c + 4) * to_n, _mm256_permute2f128_ps(m[c], m[c + 4], 0x31));
  }
#else
  for (int c = 0; c < 8; c++)
    for (int j = 0; j < 8; j++) to[c * to_n + j] = from[j * from_n + c] * scale;
#endif
}

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
// c = ln 2 / r, z scores in units of log2 less their row's largest. The largest p is the height, and all are small in a
// flat row: it is what has to be exact. A large r takes all of them near one, and is solved for height - 1.
template <int V>
struct Rows {
  Vector height[V], sum[V], slope[V];
};

constexpr int kSmall = -1, kLarge = -2;  // any r under, and over, 4

// p^(r-1) where r - 1 = kWhole is 0, 1, 2 or 3.
template <int kWhole>
inline Vector power_of(Vector p) {
  if constexpr (kWhole == 0) return p > 0.0f ? all(1.0f) : Vector{};
  return kWhole == 1 ? p : kWhole == 2 ? p * p : p * p * p;
}

constexpr int64_t kSummedAtOnce = 32;

// kWhole: as above, or kSmall or kLarge for any other r.
template <int kWhole, int W, int V>
inline void evaluate(const float* z, int64_t keys, float r, Rows<V>& rows, float* powers) {
  const float c = kLn2 / r, r_minus_1 = r - 1.0f;
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

// Newton's method on N = ||relu(z c + height)||_r = 1, until every sum is one to `tolerance`, or as nearly as a float32
// height can make it, or `steps` are done. N is convex: a step ends above its root wherever it starts. Later ones
// go below that by what the inverse cubic through the last two norms and slopes says, at most as far again. Where many
// keys leave the support at once the slope jumps: this can lead far below the root, from there a step far above it, and
// so for ever. So no height is above an earlier end, or below one that was too small: two steps gain what one of plain
// Newton would. From an end that is too low, by rounding, the next goes back by a quarter of its step.
template <int kWhole, int W, int V>
void newton(const float* z, int64_t keys, float r, int steps, float tolerance, const Vector* log_total, Rows<V>& rows,
            float* powers) {
  const Vector highest = all(kWhole == kLarge ? 0.0f : 1.0f);
  // Height, N - 1 and d height / d N of the last step; the least height, the largest too small, and the lowest end.
  Vector before[V], off_before[V]{}, inverse_before[V]{}, lowest[V], least[V], most[V];
  for (int v = 0; v < V; v++) {
    before[v] = lowest[v] = least[v] = lowest_of(r, log_total[v]), most[v] = highest;
    rows.height[v] = larger(rows.height[v], lowest[v]);
  }
  for (int step = 0;; step++) {
    evaluate<kWhole, W, V>(z, keys, r, rows, powers);
    Vector worst{};
    for (int v = 0; v < V; v++) {
      const Vector off = rows.sum[v] - 1.0f, resolved = kWhole == kLarge ? all(1.0f) : rows.height[v];
      const Vector left = larger(off, -off) - larger(all(tolerance), rows.slope[v] * resolved * (r * 1.5e-7f));
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

template <int W, int V>
void whole(const float* z, int64_t keys, int r_minus_1, int steps, float tolerance, const Vector* log_total,
           Rows<V>& rows) {
  const auto few = r_minus_1 == 0 ? newton<0, W, V> : newton<1, W, V>;
  const auto many = r_minus_1 == 2 ? newton<2, W, V> : newton<3, W, V>;
  (r_minus_1 < 2 ? few : many)(z, keys, r_minus_1 + 1.0f, steps, tolerance, log_total, rows, nullptr);
}

// Find the heights. Returns r - 1 if 0, 1, 2 or 3; else kSmall or kLarge, with p^(r-1) of every score in `powers`.
template <int W, int V>
int solve(const float* z, int64_t keys, float r, int steps, const Vector* log_total, Rows<V>& rows, float* powers) {
  // A step in the weights follows, which squares what is left of the residual; only keys within
  // delta = |sum - 1| / (r slope) of the threshold, slope >= 1, are off by up to delta^r. Sums are exact to about 1e-6.
  const float exact = r * std::pow(5.0e-6f / (float)keys, 1.0f / r), tolerance = std::clamp(exact, 1.0e-6f, 3.0e-4f);
  const int below = (int)r;
  for (int v = 0; v < V; v++) rows.height[v] = all(1.0f);
  if ((float)below == r && below <= 4) {
    whole<W, V>(z, keys, below - 1, steps, tolerance, log_total, rows);
    return below - 1;
  }
  if (r > 4.0f) {  // starts from the lowest
    for (int v = 0; v < V; v++) rows.height[v] = all(-1.0f);
    newton<kLarge, W, V>(z, keys, r, steps, tolerance, log_total, rows, powers);
    return kLarge;
  }
  // The threshold in units of z is nearly linear in r between two whole ones.
  Rows<V> upper = rows;
  whole<W, V>(z, keys, below - 1, 3, 1.0e-2f, log_total, rows);
  whole<W, V>(z, keys, below, 3, 1.0e-2f, log_total, upper);
  for (int v = 0; v < V; v++) {
    const Vector low = (1.0f - rows.height[v]) * (float)below, high = (1.0f - upper.height[v]) * (float)(below + 1);
    rows.height[v] = smaller(1.0f - (low + (r - (float)below) * (high - low)) / r, all(1.0f));
  }
  newton<kSmall, W, V>(z, keys, r, steps, tolerance, log_total, rows, powers);
  return kSmall;
}

// to = to * w_to + w_sparse * sparse map; the sparse map alone in sparse_to where that is asked for.
template <int kWhole, int W, int V>
void write_maps(const float* z, int64_t keys, float r, const Rows<V>& rows, const Vector* w_to, const Vector* w_sparse,
                const Vector* w_alone, const float* powers, float* to, float* sparse_to) {
  const float c = kLn2 / r;
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

// `to` holds each score's exp on entry, and weights of the values on return: if `divide`, w_dense of what it held over
// its sum `total`, else just that, plus w_sparse of the sparse map. That alone goes to sparse_to where it is asked for;
// sparse_to may be z.
template <int W, int V>
void maps_of(const float* z, int64_t keys, float alpha, int steps, const float* total, float w_dense, float w_sparse,
             bool divide, float* powers, float* to, float* sparse_to) {
  Rows<V> rows;
  Vector inverse[V], w_to[V], w_alone[V], w_s[V], log_total[V];
  const float r = 1.0f / std::max(alpha - 1.0f, 1.1920929e-7f);
  const bool dense = (w_sparse == 0.0f && !sparse_to) || alpha - 1.0f < 2.4e-7f;
  for (int v = 0; v < V; v++) {
    const Vector t = load(total + v * kLanes);
    inverse[v] = t == 0.0f ? Vector{} : 1.0f / t;  // a row without keys is zeros, one with a NaN is NaN
    log_total[v] = log2_of(larger(t, all(1.0f))) * kLn2;
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
  switch (solve<W, V>(z, keys, r, steps, log_total, rows, powers)) {
#define WRITE(whole) return write_maps<whole, W, V>(z, keys, r, rows, w_to, w_s, w_alone, powers, to, sparse_to)
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
