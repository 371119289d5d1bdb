// Products of a few weight rows with the tokens of one task, in float32.
//
// Full vectors of tokens go as panels, [K, LANES]: a lane is a token, a weight is read once for LANES tokens,
// and nothing is summed across lanes. What remains, too few for a vector, goes as rows, [K]: a lane is a k.

#pragma once

#include <algorithm>
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

constexpr i64 STEP = 16;  // values of k between two fetches

// Weights that come next, fetched while the present ones are multiplied: rows of a matrix lie in different
// pages, and with each page a processor's own prefetching starts anew.
struct Ahead {
  const char *first, *second;  // `begin` to `end` of HALF rows from either, `stride` bytes apart
  i64 stride, element;
  int begin, end;

  // The rows of tile `i` of `n`: evenly spread, memory and arithmetic work side by side.
  Ahead part(i64 i, i64 n) const {
    return {first, second, stride, element, int(end * i / n), int(end * (i + 1) / n)};
  }
  void fetch(i64 k) const {
    const i64 at = k * element;
    if (at % 64 != 0) return;
    for (int r = begin; r < end; r++) {
      __builtin_prefetch(first + r * stride + at, 0, 2);
      __builtin_prefetch(second + r * stride + at, 0, 2);
    }
  }
};
template <class T>
static inline Ahead ahead_of(const Weights<T>& w) {
  const i64 element = sizeof(T);
  return {(const char*)w.first, (const char*)w.second, w.stride * element, element, 0, HALF};
}

template <int V>
static inline void panel_tile(const Weights<float>& w, i64 K, const float* x, i64 panel_size, const Ahead& ahead,
                              vec (&sums)[ROWS][V]) {
  // Enough sums under way to hide the latency of each.
  constexpr int CHAINS = V == 1 ? 2 : 1;
  vec acc[CHAINS][ROWS][V] = {};
  const i64 stride = w.stride;
  auto add = [&](i64 k, int chain) {
    const float *first = w.first + k, *second = w.second + k;
    vec lanes[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) lanes[v] = load(x + v * panel_size + k * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vec weight = splat(r < HALF ? first[r * stride] : second[(r - HALF) * stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[chain][r][v] += weight * lanes[v];
    }
  };
  for (i64 start = 0; start < K; start += STEP) {
    ahead.fetch(start);
    const i64 end = start + STEP < K ? start + STEP : K;
    i64 k = start;
    for (; k + CHAINS <= end; k += CHAINS)
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; chain++) add(k + chain, chain);
    if (k < end) add(k, 0);
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) {
      sums[r][v] = acc[0][r][v];
      if (CHAINS == 2) sums[r][v] += acc[CHAINS - 1][r][v];
    }
}

template <int M, class T>
static inline void row_tile(const Weights<T>& w, i64 K, const float* const* x, const Ahead& ahead,
                            float (&sums)[M][ROWS]) {
  vec acc[M][ROWS] = {};
  const i64 stride = w.stride;
  i64 k = 0;
  for (; k + LANES <= K; k += LANES) {
    ahead.fetch(k);
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
static inline void multiply(const Weights<T>& w, i64 K, const Tokens& x, const Ahead& ahead, float* scratch,
                            PanelsOut panels_out, RowsOut rows_out) {
  const i64 tiles = (x.num_panels + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE + (x.num_rest + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  i64 tile = 0;
  // The tile's size is an argument's type, since a lambda of C++17 takes no template arguments.
  auto panels = [&](const Weights<float>& wide, i64 v, auto size) {
    vec sums[ROWS][size()];
    panel_tile<size()>(wide, K, x.panels + v * x.panel_size, x.panel_size, ahead.part(tile++, tiles), sums);
    panels_out(v, sums);
    return v + size();
  };
  auto rows = [&](const auto& weights, i64 t, auto size) {
    float sums[size()][ROWS];
    row_tile<size()>(weights, K, x.rest + t, ahead.part(tile++, tiles), sums);
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
  // Four are two and two: three and one would leave a tile with few sums under way.
  while (v + PANELS_AT_ONCE <= x.num_panels && x.num_panels - v != 4) v = panels(wide, v, Size<PANELS_AT_ONCE>());
  while (x.num_panels - v >= 2) v = panels(wide, v, Size<2>());
  if (x.num_panels - v == 1) panels(wide, v, Size<1>());
  rest(wide);
}
