"""The C++ source of the CPU kernel: one pass from query, key and value to the output.

A tile is a few dozen queries of one head; its scores never leave the cache. Products are accumulated in registers with
the queries along the vector, so each of them is a broadcast and a multiply-add.
"""

from .cpu_solver import CPU_SOLVER

CPU_SOURCE = (
    CPU_SOLVER
    + r"""
namespace {

// out[i][j] = sum over t of left(i, t) * right[t][j], W lanes j; left(i, t) = left[i * across + t * along].
template <int R, int W>
void product_rows(const float* left, int64_t across, int64_t along, int64_t length, const float* right, float* out) {
  constexpr int kWide = W / kLanes;
  Vector sum[R][kWide];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kWide; v++) sum[r][v] = Vector{};
  for (int64_t t = 0; t < length; t++) {
    Vector row[kWide];
    for (int v = 0; v < kWide; v++) row[v] = *(const Vector*)(right + t * W + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float factor = left[r * across + t * along];
#pragma GCC unroll 8
      for (int v = 0; v < kWide; v++) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kWide; v++) *(Vector*)(out + r * W + v * kLanes) = sum[r][v];
}

template <int W>
void product(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
             float* out) {
  constexpr int R = W == 4 * kLanes ? kRows : 8;
  int64_t i = 0;
  for (; i + R <= rows; i += R) product_rows<R, W>(left + i * across, across, along, length, right, out + i * W);
  for (; i < rows; i++) product_rows<1, W>(left + i * across, across, along, length, right, out + i * W);
}

}  // namespace

enum { kPladis, kSparse, kAnderson, kGag };

// The call, as cpu_kernel.py's _Call lays it out. Strides are in elements; that of a channel is 1.
extern "C" struct Call {
  const float *query, *key, *value, *mask;
  float *output, *lse;
  int64_t batch, heads, queries, keys, channels, value_channels;
  int64_t query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n;
  int64_t mask_b, mask_h, mask_q, mask_k, output_b, output_h, output_n;
  float qk_scale, alpha, scale, temperature, zeta, eta, alpha_low, scale_low;
  int32_t kind, whole_token, steps, threads;
};

namespace {

template <int W>
struct Tile {
  const Call& call;
  std::vector<float> storage;
  float *turned, *scores, *powers, *mixed, *sparse, *t_sparse, *residual;
  alignas(64) float top[W], total[W];

  explicit Tile(const Call& c) : call(c) {
    const int64_t map = c.keys * W, heads = c.whole_token ? c.heads : 1;
    const int64_t channels = std::max(c.channels, c.value_channels);
    const bool more = c.kind == kGag || c.kind == kAnderson;
    storage.resize(channels * W + 3 * map + (more ? map : 0) + heads * 2 * c.value_channels * W + 16);
    float* at = (float*)(((uintptr_t)storage.data() + 63) & ~(uintptr_t)63);
    auto take = [&](int64_t n) { float* here = at; at += n; return here; };
    turned = take(channels * W), scores = take(map), powers = take(map), mixed = take(map);
    sparse = more ? take(map) : nullptr;
    t_sparse = take(heads * c.value_channels * W), residual = take(heads * c.value_channels * W);
  }

  // Scores over temperature less their row's largest, and what of them the maps need besides.
  void score(int64_t b, int64_t h, int64_t first, int64_t width) {
    const float* query = call.query + b * call.query_b + h * call.query_h + first * call.query_n;
    for (int64_t j = 0; j < W; j++)
      for (int64_t c = 0; c < call.channels; c++)
        turned[c * W + j] = j < width ? query[j * call.query_n + c] * call.qk_scale : 0.0f;
    product<W>(call.key + b * call.key_b + h * call.key_h, call.key_n, 1, call.keys, call.channels, turned, scores);
    if (call.mask) {
      const float* mask = call.mask + b * call.mask_b + h * call.mask_h + first * call.mask_q;
      for (int64_t k = 0; k < call.keys; k++)
        for (int64_t j = 0; j < width; j++) scores[k * W + j] += mask[j * call.mask_q + k * call.mask_k];
    }
    for (int j = 0; j < W; j++) top[j] = kMasked, total[j] = 0.0f;
    for (int64_t k = 0; k < call.keys; k++)
      for (int j = 0; j < W; j++) top[j] = scores[k * W + j] > top[j] ? scores[k * W + j] : top[j];
    for (int j = 0; j < W; j++) top[j] = top[j] < 3.4e38f ? top[j] : 3.4e38f;
    if (call.lse) {
      for (int64_t k = 0; k < call.keys; k++) {
        for (int j = 0; j < W; j++) {
          const float score = scores[k * W + j];
          const float below = std::min(score, 3.4e38f) - top[j];
          total[j] += exp_of(score <= kMasked || below < -1.0e9f ? -1.0e9f : below);
        }
      }
      for (int64_t j = 0; j < width; j++)
        call.lse[(b * call.heads + h) * call.queries + first + j] =
            total[j] > 0.0f ? top[j] + std::log(total[j]) : -INFINITY;
      for (int j = 0; j < W; j++) total[j] = 0.0f;
    }
    const float inverse = 1.0f / call.temperature;
    for (int64_t k = 0; k < call.keys; k++) {
      for (int j = 0; j < W; j++) {
        float score = scores[k * W + j];
        const bool masked = score <= kMasked;
        score = (std::min(score, 3.4e38f) - top[j]) * inverse;
        score = masked || score < -1.0e9f ? -1.0e9f : score;
        scores[k * W + j] = score;
        total[j] += exp_of(score);
      }
    }
  }

  void maps(float alpha, float w_dense, float w_sparse, float* to, float* sparse_to) {
    maps_of<W>(scores, call.keys, alpha, call.steps, total, w_dense, w_sparse, powers, to, sparse_to);
  }

  // out (value_channels, W) = map (keys, W) times value
  void times_value(int64_t b, int64_t h, const float* map, float* out) {
    product<W>(call.value + b * call.value_b + h * call.value_h, 1, call.value_n, call.value_channels, call.keys, map,
               out);
  }

  void store(int64_t b, int64_t h, int64_t first, int64_t width, const float* result) {
    float* output = call.output + b * call.output_b + h * call.output_h + first * call.output_n;
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < call.value_channels; c++) output[j * call.output_n + c] = result[c * W + j];
  }

  void linear(int64_t b, int64_t h, int64_t first, int64_t width) {
    score(b, h, first, width);
    if (call.kind == kSparse) {
      maps(call.alpha, 0.0f, 1.0f, mixed, nullptr);
    } else if (call.kind == kPladis) {
      maps(call.alpha, 1.0f - call.scale, call.scale, mixed, nullptr);
    } else {
      maps(call.alpha, 1.0f - call.scale - call.scale_low, call.scale, mixed, nullptr);
      maps(call.alpha_low, 0.0f, call.scale_low, sparse, nullptr);
      for (int64_t i = 0; i < call.keys * W; i++) mixed[i] += sparse[i];
    }
    times_value(b, h, mixed, t_sparse);
    store(b, h, first, width, t_sparse);
  }

  // GAG, eq. 11-13: T_s and T_s - T_d of one head, or of all that are projected together, then their combination.
  void gag(int64_t b, int64_t h, int64_t heads, int64_t first, int64_t width) {
    const int64_t size = call.value_channels * W, rows = heads * call.value_channels;
    for (int64_t i = 0; i < heads; i++) {
      score(b, h + i, first, width);
      maps(call.alpha, -1.0f, 1.0f, mixed, sparse);
      times_value(b, h + i, sparse, t_sparse + i * size);
      times_value(b, h + i, mixed, residual + i * size);
    }
    // Divided by the largest before it is squared, so that nothing overflows or vanishes.
    alignas(64) float largest[W], length[W], along[W], norm[W], gain[W];
    for (int j = 0; j < W; j++) largest[j] = kTiny, length[j] = along[j] = norm[j] = 0.0f;
    for (int64_t i = 0; i < rows; i++)
      for (int j = 0; j < W; j++) largest[j] = std::max(largest[j], std::fabs(t_sparse[i * W + j]));
    for (int64_t i = 0; i < rows; i++) {
      for (int j = 0; j < W; j++) {
        const float direction = t_sparse[i * W + j] / largest[j];
        length[j] += direction * direction;
        along[j] += direction * residual[i * W + j];
      }
    }
    // r~ = zeta r + (1 - zeta) r_par, kept where r was
    for (int j = 0; j < W; j++) along[j] = (1.0f - call.zeta) * along[j] / std::max(length[j], 1.0f), gain[j] = kTiny;
    for (int64_t i = 0; i < rows; i++) {
      for (int j = 0; j < W; j++) {
        float update = call.zeta * residual[i * W + j] + along[j] * (t_sparse[i * W + j] / largest[j]);
        residual[i * W + j] = update;
        gain[j] = std::max(gain[j], std::fabs(update));
      }
    }
    for (int64_t i = 0; i < rows; i++) {
      for (int j = 0; j < W; j++) {
        const float scaled = residual[i * W + j] / gain[j];
        norm[j] += scaled * scaled;
      }
    }
    for (int j = 0; j < W; j++) {
      const float whole = gain[j] * std::sqrt(norm[j]);
      gain[j] = call.scale * (whole > call.eta ? call.eta / whole : 1.0f);
    }
    for (int64_t i = 0; i < rows; i++)
      for (int j = 0; j < W; j++) t_sparse[i * W + j] += gain[j] * residual[i * W + j];
    for (int64_t i = 0; i < heads; i++) store(b, h + i, first, width, t_sparse + i * size);
  }
};

template <int W>
void run(const Call& call) {
  const int64_t across = (call.queries + W - 1) / W, together = call.whole_token ? call.heads : 1;
  const int64_t groups = call.heads / together, tiles = call.batch * groups * across;
#pragma omp parallel num_threads(call.threads)
  {
    Tile<W> tile(call);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t first = i % across * W, width = std::min<int64_t>(W, call.queries - first);
      const int64_t b = i / across / groups, h = i / across % groups * together;
      if (call.kind == kGag)
        tile.gag(b, h, together, first, width);
      else
        tile.linear(b, h, first, width);
    }
  }
}

}  // namespace

extern "C" void pladis_attention(const Call* call) {
  // A tile stays in the second-level cache.
  call->keys <= 1024 ? run<4 * kLanes>(*call) : run<kLanes>(*call);
}
"""
)
