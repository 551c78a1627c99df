// CPU kernels of the serving path: small matmuls, norms, rotation, gating, writing to and attending over pages.
//
// Plain C interface over raw pointers (see __init__.py); each function has a twin in torch that tests hold it to.
// T is float or bf16; sums are in float32. Every output element is computed by one thread in one order, so the
// number of threads changes nothing. Needs AVX-512 with BF16; threads are those of torch's own OpenMP.

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};

using f32v = __m512;

inline f32v load(const float* p) { return _mm512_loadu_ps(p); }
inline f32v load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline f32v load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline f32v load(const bf16* p, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store(float* p, f32v x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, x); }
inline void store(bf16* p, f32v x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { store(p, _mm512_set1_ps(x), 1); }

// How many numbers one step of a dot product takes, and the step itself.
template <class T>
struct Dot;
template <>
struct Dot<float> {
  static constexpr int step = 16;
  using vec = __m512;
  static vec load(const float* p) { return _mm512_loadu_ps(p); }
  static vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static f32v add(f32v sum, vec a, vec b) { return _mm512_fmadd_ps(a, b, sum); }
};
template <>
struct Dot<bf16> {
  static constexpr int step = 32;
  using vec = __m512bh;
  static vec load(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static vec load(const bf16* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
  }
  static f32v add(f32v sum, vec a, vec b) { return _mm512_dpbf16_ps(sum, a, b); }
};

// The sums of 16 vectors as one vector: lane i is the sum of v[i].
inline f32v sums(const f32v* v) {
  f32v a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const f32v lo = _mm512_unpacklo_ps(v[i], v[i + 8]), hi = _mm512_unpackhi_ps(v[i], v[i + 8]);
    a[i] = _mm512_add_ps(lo, hi);  // v[i] in even lanes, v[i + 8] in odd ones
  }
  for (int i = 0; i < 4; ++i) {
    const f32v lo = _mm512_unpacklo_ps(a[i], a[i + 4]), hi = _mm512_unpackhi_ps(a[i], a[i + 4]);
    b[i] = _mm512_add_ps(lo, hi);  // in each 128 bits: v[i], v[i + 4], v[i + 8], v[i + 12]
  }
  for (int i = 0; i < 2; ++i) {
    const f32v lo = _mm512_shuffle_f32x4(b[i], b[i + 2], 0x88), hi = _mm512_shuffle_f32x4(b[i], b[i + 2], 0xdd);
    c[i] = _mm512_add_ps(lo, hi);
  }
  const f32v lo = _mm512_shuffle_f32x4(c[0], c[1], 0x88), hi = _mm512_shuffle_f32x4(c[0], c[1], 0xdd);
  const f32v mixed = _mm512_add_ps(lo, hi);
  const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  return _mm512_permutexvar_ps(order, mixed);
}

// e^x for x <= 0, to about 1e-7 relative; far below zero it is 0. NaN stays NaN: of max, the second operand.
inline f32v exponential(f32v x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const f32v n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  f32v r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  f32v y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

constexpr int64_t SHORT = 3072;  // numbers in a row of a weight

// out[b][n] = x[b] . w[n] for B rows of x and N of w; rows of w past `rows` repeat the last one and are dropped.
// Several rows of w at once: several streams from memory are faster than one.
template <class T, int B, int N>
inline void dots(const T* x, int64_t x_stride, const T* w, int64_t width, int rows, float (*out)[N]) {
  using D = Dot<T>;
  f32v sum[B][N];
  const T* row[N];
  for (int n = 0; n < N; ++n) row[n] = w + (n < rows ? n : rows - 1) * width;
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < N; ++n) sum[b][n] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + D::step <= width; k += D::step) {
    typename D::vec weight[N];
    for (int n = 0; n < N; ++n) {
      weight[n] = D::load(row[n] + k);
      _mm_prefetch(row[n] + k + N * width, _MM_HINT_T0);  // of the rows that come next
    }
    for (int b = 0; b < B; ++b) {
      const auto given = D::load(x + b * x_stride + k);
      for (int n = 0; n < N; ++n) sum[b][n] = D::add(sum[b][n], given, weight[n]);
    }
  }
  if (k < width)
    for (int b = 0; b < B; ++b) {
      const auto given = D::load(x + b * x_stride + k, width - k);
      for (int n = 0; n < N; ++n) sum[b][n] = D::add(sum[b][n], given, D::load(row[n] + k, width - k));
    }
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < N; ++n) out[b][n] = _mm512_reduce_add_ps(sum[b][n]);
}

// One row by one row, in four sums: short rows come fastest as one stream.
template <class T>
float dot(const T* x, const T* w, int64_t width) {
  using D = Dot<T>;
  f32v sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t k = 0;
  for (; k + 4 * D::step <= width; k += 4 * D::step)
    for (int i = 0; i < 4; ++i)
      sum[i] = D::add(sum[i], D::load(x + k + i * D::step), D::load(w + k + i * D::step));
  for (; k < width; k += D::step) sum[0] = D::add(sum[0], D::load(x + k, width - k), D::load(w + k, width - k));
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

template <class T, int B, int N>
void linear_block(const T* x, int64_t x_stride, const T* w, const T* bias, const T* residual, T* out, int64_t outputs,
                  int64_t width, int rows) {
  float found[B][N];
  if (B == 1 && width <= SHORT)
    for (int n = 0; n < rows; ++n) found[0][n] = dot(x, w + n * width, width);
  else
    dots<T, B, N>(x, x_stride, w, width, rows, found);
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < rows; ++n) {
      float y = found[b][n];
      if (bias) y += to_float(bias[n]);
      if (residual) y += to_float(residual[b * outputs + n]);
      put(out + b * outputs + n, y);
    }
}

template <class T, int N>
void linear_in_blocks(const T* x, int64_t x_stride, const T* w, const T* bias, const T* residual, T* out,
                      int64_t batch, int64_t outputs, int64_t width) {
  const int64_t blocks = (outputs + N - 1) / N;
#pragma omp parallel for schedule(static) if (outputs * width > 8192)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t n0 = block * N;
    const int rows = static_cast<int>(outputs - n0 < N ? outputs - n0 : N);
    for (int64_t b = 0; b < batch; b += 4) {
      const int64_t at = b * outputs + n0;
      const T *part = x + b * x_stride, *weight = w + n0 * width, *more = bias ? bias + n0 : nullptr;
      const T* before = residual ? residual + at : nullptr;
      switch (batch - b) {
        case 1: linear_block<T, 1, N>(part, x_stride, weight, more, before, out + at, outputs, width, rows); break;
        case 2: linear_block<T, 2, N>(part, x_stride, weight, more, before, out + at, outputs, width, rows); break;
        case 3: linear_block<T, 3, N>(part, x_stride, weight, more, before, out + at, outputs, width, rows); break;
        default: linear_block<T, 4, N>(part, x_stride, weight, more, before, out + at, outputs, width, rows);
      }
    }
  }
}

template <class T>
void linear(const T* x, int64_t x_stride, const T* w, const T* bias, const T* residual, T* out, int64_t batch,
            int64_t outputs, int64_t width) {
  if (batch == 1)
    linear_in_blocks<T, 8>(x, x_stride, w, bias, residual, out, batch, outputs, width);
  else
    linear_in_blocks<T, 4>(x, x_stride, w, bias, residual, out, batch, outputs, width);
}

template <class T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
  f32v sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16) {
    const f32v part = load(x + i, first(width - i));
    sum = _mm512_fmadd_ps(part, part, sum);
  }
  return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + eps);
}

// As the twin does: the normed value is rounded to T before it is multiplied with the weight.
template <class T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  const f32v scale = _mm512_set1_ps(inverse_rms(x, width, eps));
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = first(width - i);
    T rounded[16];
    store(rounded, _mm512_mul_ps(load(x + i, mask), scale), 0xffff);
    store(out + i, _mm512_mul_ps(load(rounded), load(weight + i, mask)), mask);
  }
}

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > 32768)
  for (int64_t r = 0; r < rows; ++r) norm_row(x + r * width, weight, out + r * width, width, eps);
}

// Rotates `heads` heads of `width` numbers in every row, in place; cos and sin are [rows, width].
template <class T>
void rotate(T* x, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t width) {
  const int64_t half = width / 2;
#pragma omp parallel for schedule(static) if (rows * heads * width > 32768)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      T* head = x + r * stride + h * width;
      const T *c = cos + r * width, *s = sin + r * width;
      for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 mask = first(half - i);
        const f32v a = load(head + i, mask), b = load(head + half + i, mask);
        store(head + i, _mm512_fnmadd_ps(b, load(s + i, mask), _mm512_mul_ps(a, load(c + i, mask))), mask);
        store(head + half + i,
              _mm512_fmadd_ps(a, load(s + half + i, mask), _mm512_mul_ps(b, load(c + half + i, mask))), mask);
      }
    }
}

// out = silu(gate) * up, with gate and up side by side in each row of x [rows, 2 * width].
template <class T>
void gated(const T* x, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
  for (int64_t r = 0; r < rows; ++r) {
    const T *gate = x + r * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      const f32v g = load(gate + i, mask), one = _mm512_set1_ps(1.0f);
      const f32v small = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));  // e^-|g|: no overflow
      const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
      const f32v top = _mm512_mask_blend_ps(negative, one, small);
      const f32v silu = _mm512_div_ps(_mm512_mul_ps(g, top), _mm512_add_ps(one, small));
      T rounded[16];
      store(rounded, silu, 0xffff);
      store(out + r * width + i, _mm512_mul_ps(load(rounded), load(up + i, mask)), mask);
    }
  }
}

template <class T>
void write_pages(const T* k, const T* v, int64_t k_stride, int64_t v_stride, const int64_t* rows,
                 const int64_t* slots, int64_t count, T* keys, T* values, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(keys + slots[i] * width, k + rows[i] * k_stride, width * sizeof(T));
    std::memcpy(values + slots[i] * width, v + rows[i] * v_stride, width * sizeof(T));
  }
}

constexpr int TILE = 16;   // queries that go over the pages together
constexpr int SLOTS = 16;  // positions that are scored together
constexpr int WIDEST = 256;

// Some queries of one request and one key/value head. Scores of 16 positions at a time, softmax as it goes.
template <class T>
struct Tile {
  const T* query[TILE];
  T* out[TILE];
  int64_t visible[TILE];
  int count = 0;
  int64_t width;
  float scale;
  alignas(64) float sum[TILE][WIDEST];
  alignas(64) float value[SLOTS][WIDEST];
  float highest[TILE], total[TILE];

  void begin() {
    for (int q = 0; q < count; ++q) {
      highest[q] = -3.4e38f;
      total[q] = 0.0f;
      std::memset(sum[q], 0, width * sizeof(float));
    }
  }

  // Positions [start, start + n), n <= SLOTS: keys and values `stride` numbers apart.
  void see(const T* keys, const T* values, int64_t stride, int64_t start, int n) {
    for (int s = 0; s < n; ++s)
      for (int64_t d = 0; d < width; d += 16) _mm512_store_ps(value[s] + d, load(values + s * stride + d, first(width - d)));
    for (int q = 0; q < count; ++q) {
      const int64_t seen = visible[q] - start;
      if (seen > 0) add(q, keys, stride, static_cast<int>(seen < n ? seen : n));
    }
  }

  void add(int q, const T* keys, int64_t stride, int n) {
    using D = Dot<T>;
    f32v score[SLOTS];
    for (int s = 0; s < SLOTS; ++s) {
      score[s] = _mm512_setzero_ps();
      if (s >= n) continue;
      for (int64_t d = 0; d < width; d += D::step)
        score[s] = D::add(score[s], D::load(query[q] + d, width - d), D::load(keys + s * stride + d, width - d));
    }
    const __mmask16 mask = first(n);
    const f32v scores = _mm512_mul_ps(sums(score), _mm512_set1_ps(scale));
    const float top = _mm512_mask_reduce_max_ps(mask, scores);
    if (top > highest[q]) {
      const float fade = _mm512_cvtss_f32(exponential(_mm512_set1_ps(highest[q] - top)));
      for (int64_t d = 0; d < width; d += 16)
        _mm512_store_ps(sum[q] + d, _mm512_mul_ps(_mm512_load_ps(sum[q] + d), _mm512_set1_ps(fade)));
      total[q] *= fade;
      highest[q] = top;
    }
    const f32v chance = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(scores, _mm512_set1_ps(highest[q]))));
    total[q] += _mm512_reduce_add_ps(chance);
    alignas(64) float weight[SLOTS];
    _mm512_store_ps(weight, chance);
    for (int64_t d = 0; d < width; d += 16) {
      f32v part = _mm512_load_ps(sum[q] + d);
      for (int s = 0; s < n; ++s) part = _mm512_fmadd_ps(_mm512_set1_ps(weight[s]), _mm512_load_ps(value[s] + d), part);
      _mm512_store_ps(sum[q] + d, part);
    }
  }

  void end() {
    for (int q = 0; q < count; ++q)
      for (int64_t d = 0; d < width; d += 16)
        store(out[q] + d, _mm512_div_ps(_mm512_load_ps(sum[q] + d), _mm512_set1_ps(total[q])), first(width - d));
  }
};

struct Task {
  int64_t entry, head, from, to;  // queries [from, to) of an entry: its rows times the heads of a group
};

// q [T, heads, width] over pages [P, slots, kv_heads, width]. Entry e has rows[row_starts[e]..row_starts[e + 1]),
// as many `visible`, and pages[page_starts[e]..].
template <class T>
void attend(const T* q, int64_t q_stride, const T* keys, const T* values, T* out, const int64_t* rows,
            const int64_t* visible, const int64_t* row_starts, const int64_t* pages, const int64_t* page_starts,
            int64_t entries, int64_t heads, int64_t kv_heads, int64_t width, int64_t slots, float scale) {
  const int64_t group = heads / kv_heads, stride = kv_heads * width;
  std::vector<Task> tasks;
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t queries = (row_starts[e + 1] - row_starts[e]) * group;
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t from = 0; from < queries; from += TILE)
        tasks.push_back({e, h, from, from + TILE < queries ? from + TILE : queries});
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Task task = tasks[i];
    Tile<T> tile;
    tile.width = width;
    tile.scale = scale;
    int64_t last = 0;
    for (int64_t j = task.from; j < task.to; ++j) {
      const int64_t place = row_starts[task.entry] + j / group, head = task.head * group + j % group;
      tile.query[tile.count] = q + rows[place] * q_stride + head * width;
      tile.out[tile.count] = out + (rows[place] * heads + head) * width;
      tile.visible[tile.count++] = visible[place];
      if (visible[place] > last) last = visible[place];
    }
    tile.begin();
    const int64_t* own = pages + page_starts[task.entry];
    for (int64_t start = 0; start < last; start += slots) {
      const int64_t at = own[start / slots] * slots * stride + task.head * width;
      const int64_t here = last - start < slots ? last - start : slots;
      for (int64_t s = 0; s < here; s += SLOTS)
        tile.see(keys + at + s * stride, values + at + s * stride, stride, start + s,
                 static_cast<int>(here - s < SLOTS ? here - s : SLOTS));
    }
    tile.end();
  }
}

}  // namespace

#define EXPORT(T, kind)                                                                                              \
  extern "C" void linear_##kind(const T* x, int64_t x_stride, const T* w, const T* bias, const T* residual, T* out,  \
                                int64_t batch, int64_t outputs, int64_t width) {                                     \
    linear<T>(x, x_stride, w, bias, residual, out, batch, outputs, width);                                           \
  }                                                                                                                  \
  extern "C" void rms_norm_##kind(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps) {     \
    rms_norm<T>(x, weight, out, rows, width, eps);                                                                   \
  }                                                                                                                  \
  extern "C" void rotate_##kind(T* x, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t heads,       \
                                int64_t width) {                                                                     \
    rotate<T>(x, stride, cos, sin, rows, heads, width);                                                              \
  }                                                                                                                  \
  extern "C" void gated_##kind(const T* x, T* out, int64_t rows, int64_t width) { gated<T>(x, out, rows, width); }   \
  extern "C" void write_pages_##kind(const T* k, const T* v, int64_t k_stride, int64_t v_stride,                     \
                                     const int64_t* rows, const int64_t* slots, int64_t count, T* keys, T* values,   \
                                     int64_t width) {                                                                \
    write_pages<T>(k, v, k_stride, v_stride, rows, slots, count, keys, values, width);                               \
  }                                                                                                                  \
  extern "C" void attend_##kind(const T* q, int64_t q_stride, const T* keys, const T* values, T* out,                \
                                const int64_t* rows, const int64_t* visible, const int64_t* row_starts,              \
                                const int64_t* pages, const int64_t* page_starts, int64_t entries, int64_t heads,    \
                                int64_t kv_heads, int64_t width, int64_t slots, float scale) {                       \
    attend<T>(q, q_stride, keys, values, out, rows, visible, row_starts, pages, page_starts, entries, heads,         \
              kv_heads, width, slots, scale);                                                                        \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
