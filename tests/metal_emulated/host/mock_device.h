// What the mock hands to Python, and what it is told.
#pragma once

#include <cstddef>
#include <cstdint>

struct MockBuffer {
  int index;
  void* data;
  size_t bytes;
};
struct MockConstant {
  int index, is_bool, value;
};
struct MockCallbacks {
  // Whether a text compiles; otherwise `message` has what the compiler says.
  int (*compile)(const char* name, const char* text, char* message, size_t length);
  void (*launch)(const char* entry, const MockBuffer*, int buffers, const MockConstant*,
                 int constants, const uint32_t* grid, const uint32_t* threads);
  size_t most_threads;  // of a pipeline
};

void mock_device(const MockCallbacks&);
