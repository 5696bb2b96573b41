// The CPU kernel's products, in vectors of whatever registers the machine has, and its numbers as they lie in memory.
//
// Products are summed in registers, by a broadcast and multiply-adds.

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

// float16 and bfloat16, by their bits.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Brain x) { return as_float((uint32_t)x.bits << 16); }
inline float to_float(Half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
  const float number = as_float(rest) * 5.19229686e33f;  // 2^112; takes in the subnormal ones
  return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : as_bits(number)));
}
inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, Brain* to) {
  const uint32_t bits = as_bits(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void from_float(float x, Half* to) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size >= 0x47800000)
    half = size > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or too large
  else if (size < 0x38800000)
    half = as_bits(as_float(size) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
  else
    half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  to->bits = sign | half;
}

template <class T>
void copy_rows(const T* from, int64_t from_n, int64_t rows, int64_t columns, float* to, int64_t to_n) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t c = 0; c < columns; c++) to[i * to_n + c] = to_float(from[i * from_n + c]);
    for (int64_t c = columns; c < to_n; c++) to[i * to_n + c] = 0.0f;
  }
}

}  // namespace
