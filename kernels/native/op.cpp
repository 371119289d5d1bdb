// `modes_fx::masked_moe` for CPU tensors: looks for a kernel and calls it. Whatever no kernel takes, wrong
// arguments too, goes to `modes_fx::masked_moe_fallback`, which Python provides.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "arguments.h"

namespace {

using at::ScalarType;
using at::Tensor;
using Kernel = i64 (*)(const void*);
using Maybe = std::optional<Tensor>;

// Kernels by formula and dtype, the latest first. Entries are never freed: a call may be reading them.
struct Entry {
  std::string activation;
  bool is_bfloat16, is_gated;
  Kernel kernel;
  const Entry* next;
};
std::atomic<const Entry*> entries;

const Entry* find(std::string_view activation, bool is_bfloat16) {
  for (const Entry* entry = entries; entry; entry = entry->next)
    if (entry->is_bfloat16 == is_bfloat16 && entry->activation == activation) return entry;
  return nullptr;
}

bool has_shape(const Tensor& x, std::initializer_list<i64> sizes) { return x.sizes() == at::IntArrayRef(sizes); }

bool is_float(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
}

// The shortest matrix side that a register tile of the kernel fits in.
constexpr i64 MIN_SIDE = 8;

Tensor masked_moe(const Tensor& hidden, const Tensor& scores, const Tensor& weights, const Tensor& experts,
                  const Maybe& modality, const Tensor& gate_up, const Tensor& down, const Maybe& gate_up_bias,
                  const Maybe& down_bias, double alpha_text, double alpha_vision, double tau_text,
                  double tau_vision, std::string_view activation, bool interleaved, bool is_transposed,
                  bool weights_on_input, bool renormalise, std::string_view layer) {
  const ScalarType dtype = hidden.scalar_type();
  const bool is_bfloat16 = dtype == ScalarType::BFloat16;
  const Entry* entry = is_transposed ? nullptr : find(activation, is_bfloat16);
  auto takes = [&] {
    if (!entry || !is_float(hidden) || hidden.dim() != 2 || scores.dim() != 2 || down.dim() != 3) return false;
    const i64 T = hidden.size(0), H = hidden.size(1), K = scores.size(1);
    if (T * K > std::numeric_limits<int32_t>::max()) return false;
    const i64 E = down.size(0), O = down.size(1), I = down.size(2), N = entry->is_gated ? 2 * I : I;
    auto fits = [&](const Maybe& bias, i64 size) {
      return !bias || (bias->scalar_type() == dtype && has_shape(*bias, {E, size}));
    };
    return has_shape(scores, {T, K}) && has_shape(weights, {T, K}) && has_shape(experts, {T, K}) &&
           is_float(scores) && is_float(weights) && experts.scalar_type() == ScalarType::Long &&
           (!modality || (modality->scalar_type() == ScalarType::Byte && modality->numel() == T)) &&
           gate_up.scalar_type() == dtype && down.scalar_type() == dtype && has_shape(gate_up, {E, N, H}) &&
           hidden.stride(1) == 1 && gate_up.stride(2) == 1 && down.stride(2) == 1 && I >= MIN_SIDE && O >= MIN_SIDE &&
           fits(gate_up_bias, N) && fits(down_bias, O);
  };
  if (!takes()) {
    static const auto fallback = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("modes_fx::masked_moe_fallback", "")
                                     .typed<decltype(masked_moe)>();
    return fallback.call(hidden, scores, weights, experts, modality, gate_up, down, gate_up_bias, down_bias,
                         alpha_text, alpha_vision, tau_text, tau_vision, activation, interleaved, is_transposed,
                         weights_on_input, renormalise, layer);
  }
  // Names, so that copies live until the kernel returns.
  const Tensor values = scores.contiguous(), factors = weights.contiguous(), ids = experts.contiguous();
  auto dense = [](const Maybe& x) { return x ? Maybe(x->contiguous()) : Maybe(); };
  const Maybe kinds = dense(modality), first_bias = dense(gate_up_bias), second_bias = dense(down_bias);
  auto data = [](const Maybe& x) { return x ? x->const_data_ptr() : nullptr; };
  Tensor out = hidden.new_empty({hidden.size(0), down.size(1)});
  ArgumentsOf<void> a;
  a.tokens = hidden.size(0);
  a.slots = scores.size(1);
  a.experts = down.size(0);
  a.hidden_size = hidden.size(1);
  a.inner_size = down.size(2);
  a.output_size = down.size(1);
  a.hidden = hidden.const_data_ptr();
  a.hidden_stride = hidden.stride(0);
  a.scores = values.const_data_ptr();
  a.weights = factors.const_data_ptr();
  a.scores_are_bfloat16 = scores.scalar_type() == ScalarType::BFloat16;
  a.weights_are_bfloat16 = weights.scalar_type() == ScalarType::BFloat16;
  a.ids = static_cast<const i64*>(ids.const_data_ptr());
  a.modality = static_cast<const uint8_t*>(data(kinds));
  a.gate_up = gate_up.const_data_ptr();
  a.down = down.const_data_ptr();
  a.gate_up_expert_stride = gate_up.stride(0);
  a.gate_up_stride = gate_up.stride(1);
  a.down_expert_stride = down.stride(0);
  a.down_stride = down.stride(1);
  a.gate_up_bias = data(first_bias);
  a.down_bias = data(second_bias);
  a.out = out.mutable_data_ptr();
  a.alpha_text = float(alpha_text);
  a.alpha_vision = float(alpha_vision);
  a.tau_text = float(tau_text);
  a.tau_vision = float(tau_vision);
  a.interleaved = interleaved;
  a.weights_on_input = weights_on_input;
  a.renormalise = renormalise;
  a.threads = at::get_num_threads();
  TORCH_CHECK_WITH(OutOfMemoryError, entry->kernel(&a) >= 0, "modes_fx::masked_moe: no memory for the kept pairs.");
  return out;
}

TORCH_LIBRARY_IMPL(modes_fx, CPU, library) { library.impl("masked_moe", masked_moe); }

}  // namespace

extern "C" void register_kernel(const char* activation, bool is_bfloat16, bool is_gated, Kernel kernel) {
  entries = new Entry{activation, is_bfloat16, is_gated, kernel, entries.load()};
}
