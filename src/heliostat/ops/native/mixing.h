// What becomes of attention's output: scaled, with a share of the sum of the values that its row sees, gated. And the
// running sums of values, one at each full page's end.
//
// To be called by all threads of a parallel region, or by one outside of any. Its twins: ops/mixing.py, ops/running.py.

#pragma once

#include "pages.h"

namespace {

// The same for all layers. Sums of page p at sums + p * page_numbers, those of a layer at layer * layer_numbers in it.
struct Mixing {
  float* sums;  // null: nothing is scaled
  int64_t page_numbers, layer_numbers;
  const int64_t* filled;  // pairs: the page before, or -1, and the page that is full now; in their order
  int64_t fills;
  int64_t length;          // N where it is fixed, else 0
  int64_t learned, gated;  // whether a row has logits of alpha, and of gates: `heads` numbers each, in this order

  int64_t gates() const { return learned + gated; }
  bool any() const { return sums || gated; }
};

// One layer of a pass, after its keys and values are written.
template <class T>
struct Mixed {
  const Mixing& options;
  const float* average;  // [heads]: alpha's moving average; null where nothing is scaled
  const T* gates;        // of row r at gates + r * stride
  int64_t stride;
  const T* values;
  Entries entries;
  int64_t layer, heads, kv_heads, width, slots;

  float* sum_of(int64_t page, int64_t head) const {
    return options.sums + page * options.page_numbers + layer * options.layer_numbers + head * width;
  }
  const T* value(int64_t page, int64_t slot, int64_t head) const {
    return values + ((page * slots + slot) * kv_heads + head) * width;
  }

  // 16 numbers from d on: the sum up to the end of page `before`, and the first `count` values of `page`.
  f32v sum(int64_t before, int64_t page, int64_t count, int64_t head, int64_t d) const {
    const __mmask16 mask = first(width - d);
    f32v found = before < 0 ? _mm512_setzero_ps() : load(sum_of(before, head) + d, mask);
    for (int64_t s = 0; s < count; ++s) found = _mm512_add_ps(found, load(value(page, s, head) + d, mask));
    return found;
  }

  // A page goes on from the one before, so their order stays; heads share nothing.
  void fill() const {
    if (!options.sums || !options.fills) return;
#pragma omp for schedule(static)
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t i = 0; i < options.fills; ++i) {
        const int64_t before = options.filled[2 * i], page = options.filled[2 * i + 1];
        for (int64_t d = 0; d < width; d += 16)
          store(sum_of(page, h) + d, sum(before, page, slots, h, d), first(width - d));
      }
  }

  // said [rows, heads, width], in place. Entries name every row once.
  void finish(T* said) const {
    if (!options.any()) return;
    const int64_t count = entries.row_starts[entries.count];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const auto* after = std::upper_bound(entries.row_starts, entries.row_starts + entries.count + 1, i);
      const int64_t* pages = entries.pages + entries.page_starts[after - entries.row_starts - 1];
      row(said, entries.rows[i], pages, entries.visible[i]);
    }
  }

  void row(T* said, int64_t r, const int64_t* pages, int64_t visible) const {
    const int64_t index = (visible - 1) / slots, seen = (visible - 1) % slots + 1, group = heads / kv_heads;
    const float counted = static_cast<float>(options.length ? options.length : visible);
    alignas(64) float total[WIDEST];
    for (int64_t h = 0; h < kv_heads; ++h) {
      for (int64_t d = 0; options.sums && d < width; d += 16)
        _mm512_store_ps(total + d, sum(index ? pages[index - 1] : -1, pages[index], seen, h, d));
      for (int64_t head = h * group; head < (h + 1) * group; ++head)
        weigh(said + (r * heads + head) * width, total, r, head, counted);
    }
  }

  void weigh(T* said, const float* total, int64_t r, int64_t head, float counted) const {
    float scale = 1, share = 0, gate = 1;
    if (options.sums) {
      scale = options.learned ? std::min(std::max(0.1f * to_float(gates[r * stride + head]) + 0.5f, 0.0f), 1.0f) : 0.5f;
      share = (average[head] - scale) / counted;
    }
    if (options.gated) gate = sigmoid(to_float(gates[r * stride + options.learned * heads + head]));
    for (int64_t d = 0; d < width; d += 16) {
      const __mmask16 mask = first(width - d);
      f32v mixed = _mm512_mul_ps(load(said + d, mask), _mm512_set1_ps(scale));
      if (options.sums) mixed = _mm512_fmadd_ps(_mm512_load_ps(total + d), _mm512_set1_ps(share), mixed);
      store(said + d, _mm512_mul_ps(mixed, _mm512_set1_ps(gate)), mask);
    }
  }

  static float sigmoid(float x) {
    const float small = _mm512_cvtss_f32(exponential(_mm512_set1_ps(-__builtin_fabsf(x))));  // e^-|x|: no overflow
    return (x < 0 ? small : 1.0f) / (1.0f + small);
  }
};

}  // namespace
