// One allocation handed out in 64-byte aligned pieces.
#pragma once

#include "simd.h"

LOWBIT_BEGIN

LOWBIT_FN int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
LOWBIT_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A first pass without memory counts the bytes: lay_out(Arena{}), then lay_out(Arena{memory}).
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += size_t(up(count * int64_t(sizeof(T)), 64));
    return piece;
  }
};

LOWBIT_END
