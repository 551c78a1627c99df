// All blocks of a transformer over the rows of a pass, in one parallel region. Keys and values lie in pages.

#pragma once

#include <omp.h>

#include "mixing.h"
#include "pages.h"
#include "pieces.h"
#include "products.h"
#include "rows.h"
#include "worn.h"

namespace {

// The weights of a block; null where the model has none. Products of one input are joined: they have a piece, or several.
template <class T>
struct Weights {
  const T *input_norm, *q_norm, *k_norm, *post_norm, *sinks;
  const float* average;  // of alpha
  Pieces<T> qkv, o, gate_up, down;
};

struct Shape {
  int64_t layers, width, heads, kv_heads, head_width, mlp_width;
  int64_t slots, layer_numbers;  // of a page; numbers of all pages of a layer
};

template <class T>
struct Blocks {
  Shape shape;
  const Weights<T>* weights;  // [layers]
  int64_t rows;
  T* x;     // [rows, width]: what comes in, and what goes out
  T* room;  // `room_numbers` for every row
  const T *cos, *sin;  // [rows, head_width]
  T *keys, *values;    // [layers, pages, slots, kv_heads, head_width]
  const int64_t *write_rows, *write_slots;
  int64_t writes;
  Entries entries;
  const Worn<T>* worn;  // [adapters]: who wears which; rows that wear none are in none of them
  int64_t adapters, ranks;  // the highest rank
  float eps;
  Mixing mixing;
  void (*look_up)(const LookUp<T>*);  // multiplies by pieces in codebooks; null where there are none
  float* sums;                        // what it wants as room

  int64_t qkv_width() const {
    return (shape.heads + 2 * shape.kv_heads) * shape.head_width + mixing.gates() * shape.heads;
  }

  // out [rows, outputs] = from [rows, inputs] by the pieces side by side, plus the residual.
  void product(const T* from, const Pieces<T>& own, const T* residual, T* out, int64_t outputs, int64_t inputs) const {
    int64_t first = 0;
    bool coded = false;
    for (int64_t i = 0; i < own.count; first += own.piece[i++].outputs) {
      const Piece<T>& piece = own.piece[i];
      coded |= piece.coded != nullptr;
      if (piece.weight)
        Product<T>{from, inputs, piece.weight, piece.bias, residual ? residual + first : nullptr, out + first,
                   rows, piece.outputs, inputs, outputs}
            .run();
    }
    if (!coded) return;
    const LookUp<T> asked{own, from, inputs, residual, out, outputs, rows, sums};
    look_up(&asked);
  }

  static constexpr int64_t LINEARS = 7;  // of a block that may wear adapters: q, k, v, o, gate, up, down

  // What adapters add to a product of `linears` joined Linears, the first of which is `first`.
  void wear(int64_t layer, int64_t first, const T* from, int64_t inputs, T* out, int64_t out_width,
            const int64_t* outputs, int64_t linears) const {
    if (!adapters) return;
    T* narrow = room + rows * (shape.width + qkv_width() + shape.heads * shape.head_width + 3 * shape.mlp_width);
    Wearing<T>{worn, adapters, layer * LINEARS + first, from, inputs, narrow, ranks, out, out_width, outputs, linears}
        .run();
  }

  // Head norms where there are any, then rotation, of all heads of queries and keys.
  void turn(T* qkv, const Weights<T>& own) const {
    const int64_t d = shape.head_width;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < shape.heads + shape.kv_heads; ++h) {
        T* head = qkv + r * qkv_width() + h * d;
        const T* norm = h < shape.heads ? own.q_norm : own.k_norm;
        if (norm) norm_row(head, norm, head, d, eps);
        rotate_head(head, cos + r * d, sin + r * d, d);
      }
  }

  void block(int64_t layer, const std::vector<Task>& tasks) const {
    const Weights<T>& own = weights[layer];
    const int64_t d = shape.head_width, q_width = shape.heads * d, kv_width = shape.kv_heads * d, f = shape.mlp_width;
    T *normed = room, *qkv = normed + rows * shape.width, *said = qkv + rows * qkv_width();
    T *wide = said + rows * q_width, *narrow = wide + rows * 2 * f;
    T *k = keys + layer * shape.layer_numbers, *v = values + layer * shape.layer_numbers;

    rms_norm(x, own.input_norm, normed, rows, shape.width, eps);
    product(normed, own.qkv, nullptr, qkv, qkv_width(), shape.width);
    const int64_t qkv_parts[] = {q_width, kv_width, kv_width}, mlp_parts[] = {f, f};
    wear(layer, 0, normed, shape.width, qkv, qkv_width(), qkv_parts, 3);
    turn(qkv, own);
    write_pages(qkv + q_width, qkv + q_width + kv_width, qkv_width(), qkv_width(), write_rows, write_slots, writes, k, v,
                kv_width);
    const Mixed<T> mixed{mixing, own.average, qkv + q_width + 2 * kv_width, qkv_width(), v, entries, layer,
                         shape.heads, shape.kv_heads, d, shape.slots};
    mixed.fill();
    Attention<T>{qkv, qkv_width(), k, v, said, entries, shape.heads, shape.kv_heads, d, shape.slots,
                 1.0f / __builtin_sqrtf(static_cast<float>(d)), own.sinks}
        .run(tasks);
    mixed.finish(said);
    product(said, own.o, x, x, shape.width, q_width);
    wear(layer, 3, said, q_width, x, shape.width, &shape.width, 1);

    rms_norm(x, own.post_norm, normed, rows, shape.width, eps);
    product(normed, own.gate_up, nullptr, wide, 2 * f, shape.width);
    wear(layer, 4, normed, shape.width, wide, 2 * f, mlp_parts, 2);
    gated(wide, narrow, rows, f);
    product(narrow, own.down, x, x, shape.width, f);
    wear(layer, 6, narrow, f, x, shape.width, &shape.width, 1);
  }

  void run() const {
    const auto tasks = tasks_of(entries, shape.heads, shape.kv_heads, omp_get_max_threads());
#pragma omp parallel
    for (int64_t layer = 0; layer < shape.layers; ++layer) block(layer, tasks);
  }
};

}  // namespace
