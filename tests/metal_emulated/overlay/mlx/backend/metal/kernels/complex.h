// As much of complex numbers as MLX's quantized kernels need to be parsed.
#pragma once
template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r = T(0), T i = T(0)) : real(r), imag(i) {}
};
template <typename T>
constexpr complex_t<T> operator+(complex_t<T> a, complex_t<T> b) {
  return {a.real + b.real, a.imag + b.imag};
}
template <typename T>
constexpr complex_t<T> operator*(complex_t<T> a, complex_t<T> b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}
typedef complex_t<float> complex64_t;
