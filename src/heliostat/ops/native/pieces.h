// What a product of joined Linears is made of, between the two libraries: plain weights for the one that runs all blocks,
// weights in codebooks for the other.

#pragma once

#include <cstdint>

namespace {

struct Coded;  // codebook_tables.h; the library that runs all blocks only hands it on

// One Linear.
template <class T>
struct Piece {
  const T* weight;     // [outputs, inputs], where it is plain
  const Coded* coded;  // where it is not
  const T* bias;       // [outputs] or null
  int64_t outputs;
};

template <class T>
struct Pieces {
  const Piece<T>* piece;
  int64_t count;
};

// Those of them that lie in codebooks, by rows of x.
template <class T>
struct LookUp {
  Pieces<T> pieces;
  const T* x;  // [batch, inputs], rows x_stride apart
  int64_t x_stride;
  const T* residual;  // null, or as out
  T* out;             // [batch, all pieces' outputs side by side], rows out_stride apart; may be the residual itself
  int64_t out_stride, batch;
  float* room;  // [batch][what each piece's `room` asks for]
};

}  // namespace
