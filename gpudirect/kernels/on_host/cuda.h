// Lets a C++ compiler take the kernels: what CUDA has and C++ has not.
//
// A block of threads runs as coroutines on one thread of the system, one after the other between two
// barriers. A barrier that not all threads of a block reach ends the process, as it would hang a device.
// This is for tests: it shows that the source computes what it should, not how fast a device is.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

struct Index {
  unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)

void barrier();
static inline void __syncthreads() { barrier(); }
static inline unsigned long long atomicXor(unsigned long long *target, unsigned long long value) {
  return __atomic_fetch_xor(target, value, __ATOMIC_RELAXED);
}
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(unsigned short bits) {
  unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return __int_as_float(int(sign | 0x7f800000u | fraction << 13));
  float size = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction | 1024), int(exponent) - 25);
  return sign ? -size : size;
}

// Nearest even.
static inline unsigned short half_of(float value) {
  unsigned bits = unsigned(__float_as_int(value)), sign = bits >> 16 & 0x8000u;
  float size = std::fabs(value);
  if (size != size) return (unsigned short)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00u);
  if (size < 0x1p-14f) return (unsigned short)(sign | unsigned(std::nearbyint(size * 0x1p24f)));
  unsigned rest = bits & 0x1fffu, kept = (bits & 0x7fffffffu) >> 13;
  kept -= (127 - 15) << 10;
  if (rest > 0x1000u || (rest == 0x1000u && (kept & 1))) kept++;
  return (unsigned short)(sign | kept);
}
