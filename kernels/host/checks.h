// Argument checks shared by the operations. Messages name the op, the argument, what was
// expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace lowbit {

class Checks {
 public:
  Checks(const char* op, Format format, mx::StreamOrDevice s)
      : op_(op), format_(format), device_(mx::to_stream(s).device) {}

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    std::ostringstream message;
    message << "[" << op_ << "] ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }

  const FormatInfo& info() const { return kFormats[int(format_)]; }
  const mx::Device& device() const { return device_; }

  void activations(const char* argument, const mx::array& x) const;
  // Packed weights with their scales and biases: dtypes, ranks and every dimension. Returns
  // (rows, columns) of one matrix.
  std::pair<int, int> weights(const mx::array& w, const mx::array& scales,
                              const OptionalArray& biases) const;
  void reduction(const mx::array& x, int expected) const;
  void bias(const OptionalArray& bias, const mx::Shape& expected) const;
  // One value, or `matrices` of them: one for each.
  void global_scale(const char* argument, const OptionalArray& scale,
                    int64_t matrices = 1) const;
  // No array larger than the memory of the device: on the CPU, allocating it would end the
  // process.
  void memory(const char* what, const mx::Shape& shape, mx::Dtype dtype) const;
  // `indices` in range, when MLX_LOWBIT_CHECK=1 (evaluates them).
  void range(const char* argument, mx::array indices, int64_t end) const;

 private:
  const char* op_;
  Format format_;
  mx::Device device_;
};

}  // namespace lowbit
