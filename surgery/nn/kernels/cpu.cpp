// The fused operators on CPUs: one pass from query, key and value to the output.
//
// A tile is a few dozen queries of one head; its scores never leave the cache. They lie as (keys, queries), the output
// as (queries, channels), so only the queries have to be turned.

#include "cpu_solver.h"

enum { kPladis, kSparse, kAnderson, kGag };  // each operator's code in operators.py
enum { kFloat, kHalf, kBrain };
enum { kNoMask, kBoolean, kAdditive };

// What a call has in common with the next of its kind, as cpu.py's _Plan lays it out. Strides are in elements;
// that of a channel is 1.
extern "C" struct Plan {
  int64_t batch, heads, key_heads, queries, keys, channels, value_channels;
  int64_t query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n;
  int64_t mask_b, mask_h, mask_q, mask_k, output_b, output_h, output_n;
  int64_t dense_b, dense_h, dense_n, dense_lse_b, dense_lse_h, dense_lse_n;
  float qk_scale;
  int32_t kind, whole_token, steps, threads, dtype, mask_kind;
};

namespace {

constexpr int64_t kKeysAtOnce = 96;  // of the values in a product: as many as the first cache holds beside the weights
constexpr int64_t kHeldFloats = 1 << 20;  // of all heads' keys and values that a thread keeps packed

struct Call : Plan {
  const void *query, *key, *value, *mask;
  void* output;
  float* lse;
  const void* dense;  // attention of the same queries to other keys, to be joined with this; nullptr if none
  const float* dense_lse;
  float alpha, scale, temperature, zeta, eta, alpha_low, scale_low, over_sparse = 1.0f, parallel = 1.0f;
};

inline float* aligned(std::vector<float>& storage, int64_t size) {
  if ((int64_t)storage.size() < size + 16) storage.resize(size + 16);
  return (float*)(((uintptr_t)storage.data() + 63) & ~(uintptr_t)63);
}

// A thread's work on W queries at a time, elements of type T.
template <class T, int W>
struct Tile {
  static constexpr int kColumns = W / kLanes, kTogether = std::min(kColumns, 2);
  const Call& call;
  const int64_t padded, packs;
  const float *key, *value;
  int64_t key_n, value_n;
  float *rows, *turned, *scores, *weights, *powers, *sparse, *t_sparse, *residual, *packed;
  std::vector<int64_t> held;
  alignas(64) float total[W], share[W];

  static int64_t padded_of(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

  Tile(const Call& c, std::vector<float>& storage)
      : call(c), padded(padded_of(c.value_channels)), packs(packs_of(c)), held(packs_of(c), -1) {
    const int64_t map = c.keys * W, results = (c.whole_token ? c.heads : 1) * padded * W;
    const bool gag = c.kind == kGag;
    float* at = aligned(storage, 2 * W * padded_of(c.channels) + 4 * map + 2 * results + packs * one_pack(c));
    auto take = [&](int64_t n) {
      float* here = at;
      at += n;
      return here;
    };
    rows = take(W * padded_of(c.channels)), turned = take(W * padded_of(c.channels));
    scores = take(map), weights = take(map), powers = take(map), sparse = scores;
    t_sparse = take(results), residual = gag ? take(results) : nullptr, packed = take(packs * one_pack(c));
  }

  static int64_t one_pack(const Call& c) { return c.keys * (padded_of(c.channels) + padded_of(c.value_channels)); }
  static int64_t packs_of(const Call& c) {
    return c.whole_token && c.key_heads * one_pack(c) <= kHeldFloats ? c.key_heads : 1;
  }

  // Of the keys and values that head h shares with its group, side by side: what a product reads then stays in the
  // cache, and has no remainder.
  void fetch(int64_t b, int64_t query_head) {
    const int64_t h = query_head / (call.heads / call.key_heads), id = b * call.key_heads + h, slot = h % packs;
    float* keys_at = packed + slot * one_pack(call);
    float* values_at = keys_at + call.keys * padded_of(call.channels);
    const T* from = (const T*)call.key + b * call.key_b + h * call.key_h;
    const T* values_from = (const T*)call.value + b * call.value_b + h * call.value_h;
    key = keys_at, value = values_at, key_n = padded_of(call.channels), value_n = padded;
    const bool few = call.queries <= 2 * W;  // for whom a copy does not pay
    const bool key_lies = sizeof(T) == 4 && (few || call.key_n == call.channels);
    const bool value_lies =
        sizeof(T) == 4 && (few || call.value_n == call.value_channels) && call.value_channels == padded;
    if (key_lies) key = (const float*)from, key_n = call.key_n;
    if (value_lies) value = (const float*)values_from, value_n = call.value_n;
    if (held[slot] == id) return;
    held[slot] = id;
    if (!key_lies) copy_rows(from, call.key_n, call.keys, call.channels, keys_at, key_n);
    if (!value_lies) copy_rows(values_from, call.value_n, call.keys, call.value_channels, values_at, value_n);
  }

  void add_mask(int64_t b, int64_t h, int64_t first, int64_t width) {
    const int64_t start = b * call.mask_b + h * call.mask_h + first * call.mask_q;
    const uint8_t* keeps = (const uint8_t*)call.mask + start;
    const float* bias = (const float*)call.mask + start;
    for (int64_t k = 0; k < call.keys; k++) {
      for (int64_t j = 0; j < width; j++) {
        const int64_t at = j * call.mask_q + k * call.mask_k;
        float& score = scores[k * W + j];
        if (call.mask_kind == kAdditive)
          score += bias[at];
        else
          score = keeps[at] ? score : -INFINITY;
      }
    }
  }

  // Scores in units of log2, over temperature, less their row's largest; 2 to them in `weights`, its sums in `total`.
  void score(int64_t b, int64_t h, int64_t first, int64_t width) {
    fetch(b, h);
    const int64_t channels = call.channels, blocks = channels - channels % 8;
    const T* from = (const T*)call.query + b * call.query_b + h * call.query_h + first * call.query_n;
    const float* query = (const float*)from;
    int64_t query_n = call.query_n;
    if (sizeof(T) != 4 || width < W) {
      copy_rows(from, call.query_n, width, channels, rows, padded_of(channels));
      std::memset(rows + width * padded_of(channels), 0, (W - width) * padded_of(channels) * 4);
      query = rows, query_n = padded_of(channels);
    }
    for (int64_t c = 0; c < blocks; c += 8)
      for (int j = 0; j < W; j += 8) transpose(query + j * query_n + c, query_n, call.qk_scale, turned + c * W + j, W);
    for (int64_t c = blocks; c < channels; c++)
      for (int j = 0; j < W; j++) turned[c * W + j] = query[j * query_n + c] * call.qk_scale;
    product(key, key_n, 1, call.keys, channels, turned, W, kColumns, scores, W, false);
    if (call.mask_kind != kNoMask) add_mask(b, h, first, width);

    Vector top[kColumns], sum[kColumns];
    for (int v = 0; v < kColumns; v++) top[v] = all(-INFINITY);
    for (int64_t k = 0; k < call.keys; k++)
      for (int v = 0; v < kColumns; v++) top[v] = larger(load(scores + k * W + v * kLanes), top[v]);
    for (int v = 0; v < kColumns; v++) top[v] = top[v] == -INFINITY ? Vector{} : top[v];
    const bool with_lse = call.lse || call.dense, lse_apart = with_lse && call.temperature != 1.0f;
    if (lse_apart) weigh(top, kLog2e, sum, false), write_lse(b, h, first, width, top, sum);
    weigh(top, kLog2e / call.temperature, sum, true);
    if (with_lse && !lse_apart) write_lse(b, h, first, width, top, sum);
    for (int v = 0; v < kColumns; v++) store(total + v * kLanes, sum[v]);
  }

  void weigh(const Vector* top, float unit, Vector* sum, bool keep) {
    constexpr int V = kColumns;
    EACH(v) sum[v] = Vector{};
    for (int64_t k = 0; k < call.keys; k++) {
      float *z = scores + k * W, *e = weights + k * W;
      Vector x[V];
      EACH(v) x[v] = larger(all(kFar), (load(z + v * kLanes) - top[v]) * unit);
      if (keep)
        EACH(v) store(z + v * kLanes, x[v]);
      to_exp2<V>(x);
      EACH(v) sum[v] += x[v];
      if (keep)
        EACH(v) store(e + v * kLanes, x[v]);
    }
  }

  void write_lse(int64_t b, int64_t h, int64_t first, int64_t width, const Vector* top, const Vector* sum) {
    for (int64_t j = 0; j < width; j++) {
      const float t = sum[j / kLanes][j % kLanes];
      const float own = top[j / kLanes][j % kLanes] + std::log(t);
      if (call.lse) call.lse[(b * call.heads + h) * call.queries + first + j] = own;
      if (!call.dense) continue;
      const float other = call.dense_lse[b * call.dense_lse_b + h * call.dense_lse_h + (first + j) * call.dense_lse_n];
      share[j] = own == -INFINITY ? 0.0f : 1.0f / (1.0f + std::exp(other - own));
    }
  }

  // Of the rows that were written their share, the rest of the dense attention to the other keys.
  void join(int64_t b, int64_t h, int64_t first, int64_t width) {
    for (int64_t j = 0; j < width; j++) {
      const T* there = (const T*)call.dense + b * call.dense_b + h * call.dense_h + (first + j) * call.dense_n;
      T* to = output_of(b, h, first + j);
      for (int64_t c = 0; c < call.value_channels; c++) {
        const float other = to_float(there[c]);
        from_float(other + share[j] * (to_float(to[c]) - other), to + c);
      }
    }
  }

  void maps(float alpha, float w_dense, float w_sparse, bool divide, float* sparse_to) {
    constexpr int V = kTogether;
    for (int v = 0; v < kColumns; v += V) {
      const int at = v * kLanes;
      maps_of<W, V>(scores + at, call.keys, alpha, call.over_sparse, call.steps, total + at, w_dense, w_sparse, divide, powers + at,
                    weights + at, sparse_to ? sparse_to + at : nullptr);
    }
  }

  // out (rows of `out_n`) = the map (keys, W), turned, times value
  void times_value(const float* map, int64_t width, float* out, int64_t out_n) {
    for (int64_t k = 0; k < call.keys; k += kKeysAtOnce)
      product(map + k * W, 1, W, width, std::min(kKeysAtOnce, call.keys - k), value + k * value_n, value_n,
              padded / kLanes, out, out_n, k > 0);
  }

  T* output_of(int64_t b, int64_t h, int64_t query) {
    return (T*)call.output + b * call.output_b + h * call.output_h + query * call.output_n;
  }

  void linear(int64_t b, int64_t h, int64_t first, int64_t width) {
    score(b, h, first, width);
    if (call.kind == kSparse) {
      maps(call.alpha, 0.0f, 1.0f, true, nullptr);
    } else if (call.kind == kPladis) {
      maps(call.alpha, 1.0f - call.scale, call.scale, true, nullptr);
    } else {  // a second map at alpha 1 and no temperature of its own is the dense one again
      const bool low = call.scale_low != 0.0f && (call.alpha_low - 1.0f >= 2.4e-7f || call.over_sparse != 1.0f);
      maps(call.alpha, low ? 1.0f - call.scale - call.scale_low : 1.0f - call.scale, call.scale, true, nullptr);
      if (low) maps(call.alpha_low, 0.0f, call.scale_low, false, nullptr);
    }
    T* output = output_of(b, h, first);
    if (sizeof(T) == 4 && padded == call.value_channels)
      return times_value(weights, width, (float*)output, call.output_n);
    times_value(weights, width, t_sparse, padded);
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < call.value_channels; c++)
        from_float(t_sparse[j * padded + c], output + j * call.output_n + c);
  }

  // GAG, eq. 11-13: T_s and r = T_s - T_d of one head, or of all that are projected together, then their combination.
  void gag(int64_t b, int64_t h, int64_t heads, int64_t first, int64_t width) {
    const int64_t size = padded * W;
    for (int64_t i = 0; i < heads; i++) {
      score(b, h + i, first, width);
      maps(call.alpha, -1.0f, 1.0f, true, sparse);
      times_value(sparse, width, t_sparse + i * size, padded);
      times_value(weights, width, residual + i * size, padded);
    }
    for (int64_t j = 0; j < width; j++) {
      float along, across;  // of the output: T_s (1 + along) + r across
      combine(heads, j, &along, &across);
      for (int64_t i = 0; i < heads; i++) {
        const float *s = t_sparse + i * size + j * padded, *r = residual + i * size + j * padded;
        T* to = output_of(b, h + i, first + j);
        int64_t c = 0;
        if (sizeof(T) == 4)
          for (; c + kLanes <= call.value_channels; c += kLanes)
            store((float*)to + c, load(s + c) + (load(s + c) * along + load(r + c) * across));
        for (; c < call.value_channels; c++) from_float(s[c] + (s[c] * along + r[c] * across), to + c);
      }
    }
  }

  // u = zeta r + (parallel - zeta) r_par, as a combination of T_s and r, times its gain.
  void combine(int64_t heads, int64_t j, float* along, float* across) {
    const int64_t size = padded * W;
    Vector ss{}, sr{}, rr{};
    for (int64_t i = 0; i < heads; i++) {
      const float *s = t_sparse + i * size + j * padded, *r = residual + i * size + j * padded;
      for (int64_t c = 0; c < padded; c += kLanes) {
        const Vector x = load(s + c), y = load(r + c);
        ss += x * x, sr += x * y, rr += y * y;
      }
    }
    const float length = sum_of(ss), dot = sum_of(sr), square = sum_of(rr), zeta = call.zeta;
    float share = (call.parallel - zeta) * (dot / length);
    float norm = std::sqrt(std::max(zeta * zeta * square + 2.0f * zeta * share * dot + share * share * length, 0.0f));
    const bool safe =
        length > 1.0e-20f && length < 1.0e20f && square < 1.0e20f && zeta >= 0.0f && zeta <= call.parallel;
    if (!safe || !(square > 1.0e-20f || call.eta > 1.0e-8f)) return combine_wide(heads, j, along, across);
    const float gain = call.scale * (norm > call.eta ? call.eta / norm : 1.0f);
    *along = gain * share, *across = gain * zeta;
  }

  // The same in float64, where squares leave float32's range or terms cancel; u replaces r.
  void combine_wide(int64_t heads, int64_t j, float* along, float* across) {
    const int64_t size = padded * W;
    double length = 0.0, dot = 0.0, square = 0.0;
    const auto each = [&](auto&& visit) {
      for (int64_t i = 0; i < heads; i++)
        for (int64_t c = 0; c < padded; c++)
          visit(t_sparse[i * size + j * padded + c], residual[i * size + j * padded + c]);
    };
    each([&](double s, float r) { length += s * s, dot += s * r; });
    const double share = length <= 1.0e-75 ? 0.0 : ((double)call.parallel - call.zeta) * dot / length;
    each([&](double s, float& r) { r = (float)(call.zeta * (double)r + share * s), square += (double)r * r; });
    const double norm = std::sqrt(square);
    *along = 0.0f, *across = (float)(call.scale * (norm > call.eta ? call.eta / norm : 1.0));
  }

  static float sum_of(Vector x) {
    for (int s = kLanes / 2; s > 0; s /= 2)
      for (int l = 0; l < s; l++) x[l] += x[l + s];
    return x[0];
  }
};

// What a thread works in, kept for its next call unless it is large.
std::vector<float>& kept_storage() {
  static thread_local std::vector<float> storage;
  return storage;
}

template <class T, int W>
void work(const Call& call, int64_t tiles, int64_t across, int64_t groups, int64_t together, std::atomic<int64_t>& next,
          int64_t at_once) {
  std::vector<float>& storage = kept_storage();
  {
    Tile<T, W> tile(call, storage);
    for (int64_t start; (start = next.fetch_add(at_once)) < tiles;) {
      for (int64_t i = start; i < std::min(start + at_once, tiles); i++) {
        const int64_t first = i % across * W, width = std::min<int64_t>(W, call.queries - first);
        const int64_t b = i / across / groups, h = i / across % groups * together;
        if (call.kind == kGag)
          tile.gag(b, h, together, first, width);
        else
          tile.linear(b, h, first, width);
        if (call.dense) tile.join(b, h, first, width);
      }
    }
  }
  if (storage.size() > 1 << 19) std::vector<float>().swap(storage);
}

template <class T, int W>
void run(const Call& call) {
  const int64_t across = (call.queries + W - 1) / W, together = call.whole_token ? call.heads : 1;
  const int64_t groups = call.heads / together, tiles = call.batch * groups * across;
  const int threads = (int)std::min<int64_t>(call.threads, tiles);
  // Neighbouring tiles share a head's keys, so a thread takes several.
  const int64_t at_once = std::max<int64_t>(1, std::min<int64_t>(16, tiles / (threads * 8)));
  std::atomic<int64_t> next{0};
  if (threads == 1) return work<T, W>(call, tiles, across, groups, together, next, at_once);
#pragma omp parallel num_threads(threads)
  work<T, W>(call, tiles, across, groups, together, next, at_once);
}

template <class T>
void run_wide(const Call& call) {
  // A tile stays in the second-level cache.
  if (call.keys > 1024 || call.queries <= 2 * kLanes)
    run<T, std::max(kLanes, 8)>(call);
  else
    run<T, 4 * kLanes>(call);
}

}  // namespace

// settings: the hyperparameters, in the order of operators.py.
extern "C" void pladis_attention(const Plan* plan, const void* query, const void* key, const void* value,
                                 const void* mask, void* output, float* lse, const void* dense, const float* dense_lse,
                                 const float* const* settings) {
  Call call{*plan, query, key, value, mask, output, lse, dense, dense_lse};
  call.alpha = *settings[0];
  if (call.kind == kSparse) {
    call.temperature = *settings[1];
  } else {
    call.scale = *settings[1], call.temperature = *settings[2];
    if (call.kind == kGag) call.zeta = *settings[3], call.eta = *settings[4], call.parallel = *settings[6];
    if (call.kind == kAnderson) call.alpha_low = *settings[3], call.scale_low = *settings[4];
    call.over_sparse = 1.0f / *settings[call.kind == kPladis ? 3 : 5];
  }
  switch (call.dtype) {
    case kFloat: return run_wide<float>(call);
    case kHalf: return run_wide<Half>(call);
    default: return run_wide<Brain>(call);
  }
}
