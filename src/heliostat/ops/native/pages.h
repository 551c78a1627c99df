// Keys and values in pages: writing them, and attention that reads them where they lie.
//
// To be called by all threads of a parallel region, or by one outside of any.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// Rows rows[i] of k and v into slots[i] (page * slots a page + place); `width` numbers each.
template <class T>
void write_pages(const T* k, const T* v, int64_t k_stride, int64_t v_stride, const int64_t* rows,
                 const int64_t* slots, int64_t count, T* keys, T* values, int64_t width) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(keys + slots[i] * width, k + rows[i] * k_stride, width * sizeof(T));
    std::memcpy(values + slots[i] * width, v + rows[i] * v_stride, width * sizeof(T));
  }
}

constexpr int TILE = 16;     // queries that go over the keys of one head together
constexpr int SLOTS = 16;    // positions that are scored together
constexpr int WIDEST = 256;  // numbers of a head
constexpr int HEADS = 8;     // heads of keys that one task takes at most

// Who asks over which pages. Entry e has rows[row_starts[e]..row_starts[e + 1]), as many `visible` (a row sees positions
// [0, visible)), and pages[page_starts[e]..].
struct Entries {
  const int64_t *rows, *visible, *row_starts, *pages, *page_starts;
  int64_t count;
};

// Queries [from, to) of an entry, its rows times the heads of a group, over heads [head, last_head) of keys.
struct Task {
  int64_t entry, head, last_head, from, to;
};

// Cut so that each thread has some; however it is cut, each query's numbers are the same.
inline std::vector<Task> tasks_of(const Entries& entries, int64_t heads, int64_t kv_heads, int threads) {
  std::vector<Task> tasks;
  const int64_t together = entries.count >= 4 * threads ? HEADS : 1;  // pages are then read from end to end
  for (int64_t e = 0; e < entries.count; ++e) {
    const int64_t queries = (entries.row_starts[e + 1] - entries.row_starts[e]) * (heads / kv_heads);
    const int64_t step = queries <= TILE ? together : 1;
    for (int64_t h = 0; h < kv_heads; h += step)
      for (int64_t from = 0; from < queries; from += TILE)
        tasks.push_back({e, h, std::min(h + step, kv_heads), from, std::min(from + TILE, queries)});
  }
  return tasks;
}

// Some queries of one request over one head of keys and values: scores of 16 positions at a time, softmax as it goes.
// V: vectors of 16 numbers in a head, known to the compiler; 0: any width.
template <class T, int V>
struct Tile {
  const T* query[TILE];
  T* out[TILE];
  int64_t visible[TILE];
  int count = 0;
  int64_t width;
  float scale;
  float highest[TILE];
  float sink[TILE];  // -inf where there is none
  alignas(64) float total[TILE][SLOTS];
  alignas(64) float chance[TILE][SLOTS];
  alignas(64) float sum[TILE * WIDEST];

  int64_t vectors() const { return V ? V : (width + 15) / 16; }
  float* sum_of(int q) { return sum + q * 16 * vectors(); }
  __mmask16 mask(int64_t v) const { return V ? 0xffff : first(width - 16 * v); }

  void begin() {
    for (int q = 0; q < count; ++q) {
      highest[q] = -3.4e38f;
      _mm512_store_ps(total[q], _mm512_setzero_ps());
    }
    std::memset(sum, 0, count * 16 * vectors() * sizeof(float));
  }

  // Positions [start, start + n), n <= SLOTS, some of which some query sees: keys and values `stride` numbers apart.
  void see(const T* keys, const T* values, int64_t stride, int64_t start, int n) {
    const int64_t most = std::min<int64_t>(*std::max_element(visible, visible + count) - start, n);
    const int turned = V && n == SLOTS && count >= 8 ? count / 8 * 8 : 0;
    if (turned) {
      turn(keys, stride);
      for (int q = 0; q < turned; q += 8) score_eight(q, start);
    }
    for (int q = turned; q < count; ++q) {
      const int64_t seen = std::min<int64_t>(visible[q] - start, n);
      if (seen > 0)
        weigh(q, score(q, keys, stride, static_cast<int>(seen)), seen);
      else
        _mm512_store_ps(chance[q], _mm512_setzero_ps());
    }
    for (int q = 0; q < count; q += 6) add_some(q, values, stride, static_cast<int>(most));
  }

  // For many queries the keys of 16 positions are turned over once, a unit of 32 bits of each side by side.
  static constexpr int UNITS = V * 16 * static_cast<int>(sizeof(T)) / 4;
  alignas(64) int32_t units[V ? V * 16 * SLOTS : 1];

  void turn(const T* keys, int64_t stride) {
    for (int u = 0; u < UNITS; u += 16) {
      __m512i v[16];
      for (int s = 0; s < SLOTS; ++s) v[s] = _mm512_loadu_si512(reinterpret_cast<const int32_t*>(keys + s * stride) + u);
      turn_over(v);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(units + (u + i) * SLOTS, v[i]);
    }
  }

  void score_eight(int q, int64_t start) {
    using D = Dot<T>;
    f32v found[8];
    const char* asks[8];
    for (int i = 0; i < 8; ++i) {
      found[i] = _mm512_setzero_ps();
      asks[i] = reinterpret_cast<const char*>(query[q + i]);
    }
    for (int u = 0; u < UNITS; ++u) {
      const auto part = D::unit(units + u * SLOTS);
      for (int i = 0; i < 8; ++i) found[i] = D::add(found[i], D::repeat(asks[i] + 4 * u), part);
    }
    for (int i = 0; i < 8; ++i) {
      const int64_t seen = visible[q + i] - start;
      if (seen > 0)
        weigh(q + i, found[i], seen);
      else
        _mm512_store_ps(chance[q + i], _mm512_setzero_ps());
    }
  }

  f32v score(int q, const T* keys, int64_t stride, int n) {
    using D = Dot<T>;
    constexpr int STEPS = V ? 16 * V / D::step : 0;
    f32v found[SLOTS];
    for (int s = 0; s < SLOTS; ++s) found[s] = _mm512_setzero_ps();
    if (V && n == SLOTS) {
      for (int i = 0; i < STEPS; ++i) {
        const auto part = D::load(query[q] + i * D::step);
        for (int s = 0; s < SLOTS; ++s) found[s] = D::add(found[s], part, D::load(keys + s * stride + i * D::step));
      }
    } else {
      for (int s = 0; s < n; ++s)
        for (int64_t d = 0; d < width; d += D::step)
          found[s] = D::add(found[s], D::load(query[q] + d, width - d), D::load(keys + s * stride + d, width - d));
    }
    return sums(found);
  }

  // chance[q] = e^(score - highest score so far), 0 for the positions from n on.
  void weigh(int q, f32v products, int64_t n) {
    const __mmask16 seen = first(n);
    const f32v scores = _mm512_mul_ps(products, _mm512_set1_ps(scale));
    const float top = _mm512_mask_reduce_max_ps(seen, scores);
    if (top > highest[q]) fade(q, top);
    const f32v e = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(scores, _mm512_set1_ps(highest[q]))));
    _mm512_store_ps(total[q], _mm512_add_ps(_mm512_load_ps(total[q]), e));
    _mm512_store_ps(chance[q], e);
  }

  void fade(int q, float top) {
    const f32v by = exponential(_mm512_set1_ps(highest[q] - top));
    float* own = sum_of(q);
    for (int64_t v = 0; v < vectors(); ++v) _mm512_store_ps(own + 16 * v, _mm512_mul_ps(_mm512_load_ps(own + 16 * v), by));
    _mm512_store_ps(total[q], _mm512_mul_ps(_mm512_load_ps(total[q]), by));
    highest[q] = top;
  }

  void add_some(int q, const T* values, int64_t stride, int n) {
    switch (std::min(count - q, 6)) {
      case 1: return add<1>(q, values, stride, n);
      case 2: return add<2>(q, values, stride, n);
      case 3: return add<3>(q, values, stride, n);
      case 4: return add<4>(q, values, stride, n);
      case 5: return add<5>(q, values, stride, n);
      default: return add<6>(q, values, stride, n);
    }
  }

  // The values of n positions, weighed, for Q queries from q on.
  template <int Q>
  void add(int q, const T* values, int64_t stride, int n) {
    constexpr int64_t AT_ONCE = V % 4 == 0 && V ? 4 : 1;
    for (int64_t v = 0; v < vectors(); v += AT_ONCE) {
      f32v part[Q][AT_ONCE];
      for (int i = 0; i < Q; ++i)
        for (int j = 0; j < AT_ONCE; ++j) part[i][j] = _mm512_load_ps(sum_of(q + i) + 16 * (v + j));
      for (int s = 0; s < n; ++s) {
        f32v value[AT_ONCE];
        for (int j = 0; j < AT_ONCE; ++j) value[j] = load(values + s * stride + 16 * (v + j), mask(v + j));
        for (int i = 0; i < Q; ++i) {
          const f32v weight = _mm512_set1_ps(chance[q + i][s]);
          for (int j = 0; j < AT_ONCE; ++j) part[i][j] = _mm512_fmadd_ps(weight, value[j], part[i][j]);
        }
      }
      for (int i = 0; i < Q; ++i)
        for (int j = 0; j < AT_ONCE; ++j) _mm512_store_ps(sum_of(q + i) + 16 * (v + j), part[i][j]);
    }
  }

  // What the sink adds to the softmax's sum; where it is far above all scores, nothing else counts.
  float drained(int q) const {
    const float above = sink[q] - highest[q];
    return above > 0 ? __builtin_expf(above) : _mm512_cvtss_f32(exponential(_mm512_set1_ps(above)));
  }

  void end() {
    for (int q = 0; q < count; ++q) {
      const f32v all = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(total[q])) + drained(q));
      for (int64_t v = 0; v < vectors(); ++v)
        store(out[q] + 16 * v, _mm512_div_ps(_mm512_load_ps(sum_of(q) + 16 * v), all), mask(v));
    }
  }
};

// q [T, heads, width], rows q_stride apart, over pages [P, slots, kv_heads, width] -> out [T, heads, width].
template <class T>
struct Attention {
  const T* q;
  int64_t q_stride;
  const T *keys, *values;
  T* out;
  Entries entries;
  int64_t heads, kv_heads, width, slots;
  float scale;
  const T* sinks;  // [heads]: of each a logit more, without a value; or null

  template <int V>
  void fill(Tile<T, V>& tile, const Task& task, int64_t kv_head) const {
    const int64_t group = heads / kv_heads;
    tile.width = width;
    tile.scale = scale;
    for (int64_t j = task.from; j < task.to; ++j) {
      const int64_t place = entries.row_starts[task.entry] + j / group, head = kv_head * group + j % group;
      tile.query[tile.count] = q + entries.rows[place] * q_stride + head * width;
      tile.out[tile.count] = out + (entries.rows[place] * heads + head) * width;
      tile.sink[tile.count] = sinks ? to_float(sinks[head]) : -__builtin_inff();
      tile.visible[tile.count++] = entries.visible[place];
    }
    tile.begin();
  }

  template <int V>
  void work(const Task& task) const {
    const int64_t stride = kv_heads * width, count = task.last_head - task.head;
    Tile<T, V> tiles[HEADS];
    for (int64_t h = 0; h < count; ++h) fill(tiles[h], task, task.head + h);
    const int64_t last = *std::max_element(tiles[0].visible, tiles[0].visible + tiles[0].count);
    const int64_t* own = entries.pages + entries.page_starts[task.entry];
    for (int64_t start = 0; start < last; start += slots) {
      const int64_t at = own[start / slots] * slots * stride + task.head * width;
      const int64_t here = std::min(last - start, slots);
      if (start + slots < last) ahead(own[start / slots + 1] * slots * stride + task.head * width, count * width);
      for (int64_t s = 0; s < here; s += SLOTS)
        for (int64_t h = 0; h < count; ++h)
          tiles[h].see(keys + at + s * stride + h * width, values + at + s * stride + h * width, stride, start + s,
                       static_cast<int>(std::min<int64_t>(here - s, SLOTS)));
    }
    for (int64_t h = 0; h < count; ++h) tiles[h].end();
  }

  // Asks for the next page early: pages lie anywhere, so the processor does not guess it.
  void ahead(int64_t at, int64_t numbers) const {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t s = 0; s < slots; ++s)
      for (int64_t i = 0; i < numbers; i += LINE) {
        _mm_prefetch(keys + at + s * kv_heads * width + i, _MM_HINT_T0);
        _mm_prefetch(values + at + s * kv_heads * width + i, _MM_HINT_T0);
      }
  }

  void run(const std::vector<Task>& tasks) const {
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (width == 64)
        work<4>(tasks[i]);
      else if (width == 128)
        work<8>(tasks[i]);
      else
        work<0>(tasks[i]);
    }
  }
};

}  // namespace
