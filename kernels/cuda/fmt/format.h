// The one name of {fmt} that MLX's cuda/lru_cache.h mentions; MLX's wheels ship that header
// without the library. Only message texts would differ, and none is made on this side.
#pragma once

#include <string>

namespace fmt {

template <class... Values>
std::string format(const char* text, const Values&...) {
  return text;
}

}  // namespace fmt
