// Products of a few weight rows with the tokens of one task, in float32.
//
// Full vectors of tokens go as panels, [K, LANES]: a lane is a token, a weight is read once for LANES tokens,
// and nothing is summed across lanes. What remains, too few for a vector, goes as rows, [K]: a lane is a k.

#pragma once

#include <type_traits>

#include "vectors.h"

constexpr int PANELS_AT_ONCE = 3, ROWS_AT_ONCE = 3, HALF = ROWS / 2;

// ROWS weight rows: HALF from each of two places, `stride` elements apart.
template <class T>
struct Weights {
  const T *first, *second;
  i64 stride;

  const T* row(int r) const { return (r < HALF ? first : second) + (r % HALF) * stride; }
};

// The left side of a product: the tokens of one task.
struct Tokens {
  const float* panels;  // [num_panels, K, LANES], `panel_size` apart
  i64 num_panels, panel_size;
  const float* rest[LANES];  // [num_rest], each [K]
  i64 num_rest;
};

// Weights that come next, fetched while the present ones are multiplied: rows of a matrix lie in different
// pages, and with each page a processor's own prefetching starts anew.
template <class T>
struct Ahead {
  Weights<T> weights;
  int begin, end;  // which of the rows

  void fetch(i64 k, i64 count) const {
    for (int r = begin; r < end; r++)
      for (i64 i = 0; i < count; i += 64 / i64(sizeof(T))) __builtin_prefetch(weights.row(r) + k + i, 0, 2);
  }
  // The share of one of several tiles: evenly spread, so that memory and arithmetic work side by side.
  Ahead share(i64 tile, i64 tiles) const {
    return {weights, int(end * tile / tiles), int(end * (tile + 1) / tiles)};
  }
};
constexpr i64 STEP = 16;

template <int V, class T>
static inline void panel_tile(const Weights<float>& w, i64 K, const float* x, i64 panel_size, const Ahead<T>& ahead,
                              vec (&sums)[ROWS][V]) {
  vec acc[ROWS][V] = {};
  const i64 stride = w.stride;
  for (i64 start = 0; start < K; start += STEP) {
    ahead.fetch(start, STEP);
    const i64 end = start + STEP < K ? start + STEP : K;
    for (i64 k = start; k < end; k++) {
      const float *first = w.first + k, *second = w.second + k;
      vec lanes[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) lanes[v] = load(x + v * panel_size + k * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const vec weight = splat(r < HALF ? first[r * stride] : second[(r - HALF) * stride]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] += weight * lanes[v];
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) sums[r][v] = acc[r][v];
}

template <int M, class T, class U>
static inline void row_tile(const Weights<T>& w, i64 K, const float* const* x, const Ahead<U>& ahead,
                            float (&sums)[M][ROWS]) {
  vec acc[M][ROWS] = {};
  const i64 stride = w.stride;
  i64 k = 0;
  for (; k + LANES <= K; k += LANES) {
    ahead.fetch(k, LANES);
    const T *first = w.first + k, *second = w.second + k;
    vec lanes[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) lanes[m] = load(x[m] + k);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vec weights = load(r < HALF ? first + r * stride : second + (r - HALF) * stride);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) acc[m][r] += weights * lanes[m];
    }
  }
  for (int m = 0; m < M; m++) {
    sum_lanes(acc[m], sums[m]);
    for (i64 tail = k; tail < K; tail++)
      for (int r = 0; r < ROWS; r++) sums[m][r] += widen(w.row(r)[tail]) * x[m][tail];
  }
}

static inline Weights<float> widened(const Weights<float>& w, i64, float*) { return w; }
static inline Weights<float> widened(const Weights<bfloat16>& w, i64 K, float* scratch) {
  for (int r = 0; r < ROWS; r++) {
    const bfloat16* from = w.row(r);
    float* to = scratch + r * K;
    i64 k = 0;
    for (; k + LANES <= K; k += LANES) store(to + k, load(from + k));
    for (; k < K; k++) to[k] = widen(from[k]);
  }
  return {scratch, scratch + HALF * K, K};
}

template <int N>
using Size = std::integral_constant<int, N>;

// Multiply ROWS weight rows with all tokens of a task: `panels_out(first panel, sums[ROWS][V])` and
// `rows_out(first row, sums[M][ROWS])` take the products. `scratch`: [ROWS, K].
template <class T, class PanelsOut, class RowsOut>
static inline void multiply(const Weights<T>& w, i64 K, const Tokens& x, const Ahead<T>& ahead, float* scratch,
                            PanelsOut panels_out, RowsOut rows_out) {
  const i64 tiles = (x.num_panels + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE + (x.num_rest + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  i64 tile = 0;
  // The tile's size is an argument's type, since a lambda of C++17 takes no template arguments.
  auto panels = [&](const Weights<float>& wide, i64 v, auto size) {
    vec sums[ROWS][size()];
    panel_tile<size()>(wide, K, x.panels + v * x.panel_size, x.panel_size, ahead.share(tile++, tiles), sums);
    panels_out(v, sums);
    return v + size();
  };
  auto rows = [&](const auto& weights, i64 t, auto size) {
    float sums[size()][ROWS];
    row_tile<size()>(weights, K, x.rest + t, ahead.share(tile++, tiles), sums);
    rows_out(t, sums);
    return t + size();
  };
  auto rest = [&](const auto& weights) {
    i64 t = 0;
    while (t + ROWS_AT_ONCE <= x.num_rest) t = rows(weights, t, Size<ROWS_AT_ONCE>());
    if (x.num_rest - t == 2) rows(weights, t, Size<2>());
    if (x.num_rest - t == 1) rows(weights, t, Size<1>());
  };
  // Weights that are used once are widened on their way; else once for all.
  if (tiles == 1 && x.num_panels == 0) return rest(w);
  const Weights<float> wide = widened(w, K, scratch);
  i64 v = 0;
  while (v + PANELS_AT_ONCE <= x.num_panels) v = panels(wide, v, Size<PANELS_AT_ONCE>());
  if (x.num_panels - v == 2) panels(wide, v, Size<2>());
  if (x.num_panels - v == 1) panels(wide, v, Size<1>());
  rest(wide);
}
