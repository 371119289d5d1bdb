// What a kernel is called with. T tokens, K slots, E experts, H and O widths of input and output, I the width
// between the products; N rows of gate_up: 2I, or I without a gate.

#pragma once

#include <cstdint>

using i64 = int64_t;

template <class Element>
struct ArgumentsOf {
  i64 tokens, slots, experts, hidden_size, inner_size, output_size;
  const Element* hidden;  // [T, H], rows `hidden_stride` apart
  i64 hidden_stride;
  const void *scores, *weights;  // [T, K], float32 or bfloat16
  bool scores_are_bfloat16, weights_are_bfloat16;
  const i64* ids;           // [T, K]
  const uint8_t* modality;  // [T], or null where all is text
  const Element *gate_up, *down;  // [E, N, H] and [E, O, I], rows contiguous, strides in elements
  i64 gate_up_expert_stride, gate_up_stride, down_expert_stride, down_stride;
  const Element *gate_up_bias, *down_bias;  // [E, N], [E, O], or null
  Element* out;                             // [T, O]
  float alpha_text, alpha_vision, tau_text, tau_vision;
  bool interleaved, weights_on_input, renormalise;
  i64 threads;
};
