// What adapters add to a product with a weight: for each row those of the one that it wears. To be called by all threads.

#pragma once

#include "products.h"

namespace {

// One adapter on one Linear: scale * b (a x), or scale * b x[columns]; nothing where b is null.
template <class T>
struct Part {
  const T* a;  // [rank, inputs]
  const int64_t* columns;  // [rank], where a is null
  const T* b;  // [outputs, rank]
  int64_t rank;
  float scale;
};

// Rows [start, stop) of a pass wear one adapter.
template <class T>
struct Worn {
  const Part<T>* parts;  // [layers, Linears of a block]
  int64_t start, stop;
};

// Linears of one input, whose outputs lie side by side.
template <class T>
struct Wearing {
  static constexpr int64_t FEW = 3;  // rows up to which a weight is read row by row, not turned over first
  static constexpr int64_t STEP = Product<T>::WIDE;

  const Worn<T>* worn;
  int64_t count, place;  // of the first Linear among all of all blocks
  const T* from;         // [rows, inputs]
  int64_t inputs;
  T* narrow;  // [rows, linears * ranks]: x by every a
  int64_t ranks;
  T* out;  // [rows, out_width]
  int64_t out_width;
  const int64_t* outputs;  // [linears]
  int64_t linears;

  // Outputs [n, n + STEP) of a product, by one thread.
  void some(const Product<T>& product, int64_t n, int32_t* packed) const {
    const int64_t last = std::min(n + STEP, product.outputs);
    if (product.width * sizeof(T) % 4) {
      for (int64_t i = n; i < last; ++i)
        for (int64_t b = 0; b < product.batch; ++b)
          product.settle(b, i, product.dot(product.x + b * product.x_stride, product.w + i * product.width));
    } else if (product.batch <= FEW && product.width > 4 * STEP) {
      for (int64_t b = 0; b < product.batch; ++b) {
        Product<T> one = product;
        one.x += b * product.x_stride, one.out += b * product.out_stride, one.batch = 1;
        if (one.residual) one.residual += b * product.out_stride;
        for (int64_t i = n; i < last; i += 8) one.one_row(i);
      }
    } else {
      product.pack(n, packed);
      for (int64_t b = 0; b < product.batch;) b += product.template next_rows<false>(b, n, packed);
    }
  }

  void down(const Worn<T>& own, int64_t linear, int64_t n, int32_t* packed) const {
    const Part<T>& part = own.parts[place + linear];
    if (!part.b || n >= part.rank) return;
    const int64_t stride = linears * ranks, rows = own.stop - own.start;
    const T* x = from + own.start * inputs;
    T* to = narrow + own.start * stride + linear * ranks;
    if (part.a) {
      some({x, inputs, part.a, nullptr, nullptr, to, rows, part.rank, inputs, stride}, n, packed);
      return;
    }
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t i = n; i < std::min(n + STEP, part.rank); ++i) to[b * stride + i] = x[b * inputs + part.columns[i]];
  }

  void up(const Worn<T>& own, int64_t linear, int64_t n, T* to, int32_t* packed) const {
    const Part<T>& part = own.parts[place + linear];
    if (!part.b) return;
    const int64_t stride = linears * ranks;
    T* y = to + own.start * out_width;
    some({narrow + own.start * stride + linear * ranks, stride, part.b, nullptr, y, y, own.stop - own.start,
          outputs[linear], part.rank, out_width, part.scale},
         n, packed);
  }

  void run() const {
    const Room packed((std::max(inputs, ranks) + 1) * STEP);
    const int64_t downs = (ranks + STEP - 1) / STEP;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * linears * downs; ++i)
      down(worn[i / (linears * downs)], i / downs % linears, i % downs * STEP, packed.numbers);
    int64_t ups = 0;
    for (int64_t l = 0; l < linears; ++l) ups += (outputs[l] + STEP - 1) / STEP;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * ups; ++i) {
      int64_t n = i % ups * STEP, linear = 0;
      T* to = out;
      for (; n >= (outputs[linear] + STEP - 1) / STEP * STEP; ++linear) {
        n -= (outputs[linear] + STEP - 1) / STEP * STEP;
        to += outputs[linear];
      }
      up(worn[i / ups], linear, n, to, packed.numbers);
    }
  }
};

}  // namespace
