// Vectors as wide as the machine's registers, by the extensions that GCC and Clang share.
//
// A loop over them is compiled as it is written: no reduction is reordered by the
// compiler, so none of the licences of -ffast-math is needed.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace normjax::NORMJAX_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

using Floats = Vector<float, kBytes / 4>;
using Doubles = Vector<double, kBytes / 8>;

// The vector in which a kernel computes: Vec<float>, or in the rare wide path Vec<double>.
template <class Real>
using Vec = Vector<Real, kBytes / sizeof(Real)>;

template <class V>
using Element = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <class V>
constexpr int kLanes = sizeof(V) / sizeof(Element<V>);

#define NORMJAX_INLINE inline __attribute__((always_inline))
#define NORMJAX_STEP __attribute__((always_inline))  // of a lambda
// Before a loop of few turns, whose arrays are to be registers.
#if defined(__clang__)
#define NORMJAX_UNROLLED _Pragma("unroll")
#else
#define NORMJAX_UNROLLED _Pragma("GCC unroll 16")
#endif

template <class V>
NORMJAX_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
NORMJAX_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class To, class From>
NORMJAX_INLINE To bits_of(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &v, sizeof to);
  return to;
}

// Past the caches, to an aligned place: memory is not read before it is written.
template <class V>
NORMJAX_INLINE void write_past(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(p), bits_of<__m512i>(v));
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(p), bits_of<__m256i>(v));
  }
  if constexpr (sizeof v == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(p), bits_of<__m128i>(v));
  }
#endif
  write(p, v);
}
// Before what was written so is told to be there.
NORMJAX_INLINE void end_writing_past() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}


// Conversions of N numbers in 16 bits, to and from float32. To nearest, ties to even; NaN
// stays NaN.

// 16 bits as the lower half of 32; GCC 12 would do it by halves of a vector.
template <int N>
NORMJAX_INLINE Vector<uint32_t, N> extended(const void* p) {
  using U = Vector<uint32_t, N>;
#if defined(__AVX512F__)
  if constexpr (N == 16) return bits_of<U>(_mm512_maskz_cvtepu16_epi32(-1, read<__m256i>(p)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return bits_of<U>(_mm256_cvtepu16_epi32(read<__m128i>(p)));
  if constexpr (N == 4) {
    return bits_of<U>(_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
#endif
  return __builtin_convertvector(read<Vector<uint16_t, N>>(p), U);
}

template <int N>
NORMJAX_INLINE Vector<float, N> widened(const Bfloat16* p) {
  return bits_of<Vector<float, N>>(extended<N>(p) << 16);
}

// The lower halves of 32 bits whose upper halves are zero.
template <int N>
NORMJAX_INLINE Vector<uint16_t, N> halved(Vector<uint32_t, N> v) {
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const auto pairs = bits_of<__m256i>(v);
    const __m256i packed = _mm256_packus_epi32(pairs, pairs);
    const __m256i in_order = _mm256_permute4x64_epi64(packed, 0xd8);
    return bits_of<Vector<uint16_t, N>>(_mm256_castsi256_si128(in_order));
  }
#endif
  return __builtin_convertvector(v, Vector<uint16_t, N>);
}

template <int N>
NORMJAX_INLINE Vector<uint16_t, N> narrowed(Vector<float, N> v, Bfloat16) {
  using U = Vector<uint32_t, N>;
  const U bits = bits_of<U>(v);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return halved<N>(v == v ? rounded : U{} + 0x7fc0);
}

// Of float16 without instructions for it. No step has a subnormal float32, which XLA's
// threads flush to zero.
template <int N>
NORMJAX_INLINE Vector<float, N> widened(const Float16* p) {
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
#if defined(__F16C__)
  if constexpr (N == 4) return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if constexpr (N == 8) return _mm256_cvtph_ps(read<__m128i>(p));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_maskz_cvtph_ps(-1, read<__m256i>(p));
#endif
  const U bits = extended<N>(p);
  const U sign = (bits & 0x8000) << 16;
  const U size = (bits & 0x7fff) << 13;  // exponent and mantissa at their places
  const U normal = size + (112u << 23);
  const U special = size + (224u << 23);  // inf and NaN
  const F least = F{} + 0x1p-14f;         // below it, the distance from it is exact
  const F small = bits_of<F>((size & 0x7fffff) | (113u << 23)) - least;
  const U of_size = size >= (31u << 23) ? special
                    : size < (1u << 23) ? bits_of<U>(small)
                                        : normal;
  return bits_of<F>(of_size | sign);
}

template <int N>
NORMJAX_INLINE Vector<uint16_t, N> narrowed(Vector<float, N> v, Float16) {
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
  using Bits [[maybe_unused]] = Vector<uint16_t, N>;
#if defined(__F16C__)
  if constexpr (N == 4) return bits_of<Bits>(_mm_cvtsi128_si64(_mm_cvtps_ph(v, 0)));
  if constexpr (N == 8) return bits_of<Bits>(_mm256_cvtps_ph(v, 0));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) return bits_of<Bits>(_mm512_maskz_cvtps_ph(-1, v, 0));
#endif
  const U bits = bits_of<U>(v);
  const U size = bits & 0x7fffffff;
  const U normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  // The spacing of float32 at one half is the least float16.
  const F half = F{} + 0.5f;
  const U small = bits_of<U>(bits_of<F>(size) + half) - bits_of<U>(half);
  const U of_size = size > 0x7f800000   ? U{} + 0x7e00
                    : size >= 0x477ff000 ? U{} + 0x7c00
                    : size < 0x38800000  ? small
                                         : normal;
  return halved<N>(of_size | ((bits >> 16) & 0x8000));
}

template <int N>
NORMJAX_INLINE Vector<float, N> widened(const float* p) {
  return read<Vector<float, N>>(p);
}
template <int N>
NORMJAX_INLINE Vector<float, N> narrowed(Vector<float, N> v, float) {
  return v;
}

// Float32 to float64, which GCC 12 would do by halves.
template <class V>
NORMJAX_INLINE V doubled(Vector<float, kLanes<V>> v) {
#if defined(__AVX512F__)
  if constexpr (kLanes<V> == 8) return _mm512_maskz_cvtps_pd(-1, v);
#endif
#if defined(__AVX__)
  if constexpr (kLanes<V> == 4) return _mm256_cvtps_pd(v);
#endif
  return __builtin_convertvector(v, V);
}

// How many lanes of a vector count: all, or the first few at the end of an array.
struct Whole {};
struct Part {
  int count;
};

// Of each lane, whether it counts.
template <class V>
NORMJAX_INLINE auto counted(Part part) {
  using Number = std::conditional_t<sizeof(Element<V>) == 4, int32_t, int64_t>;
  static constexpr Number lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read<Vector<Number, kLanes<V>>>(lanes) < part.count;
}

// v, with lanes that do not count replaced by those of another.
template <class V>
NORMJAX_INLINE V filled(V v, Whole, V) {
  return v;
}
template <class V>
NORMJAX_INLINE V filled(V v, Part part, V other) {
  return counted<V>(part) ? v : other;
}

// N numbers as float32; of a part, lanes that do not count are zero.
template <int N, class T>
NORMJAX_INLINE Vector<float, N> floats(const T* p, Whole) {
  return widened<N>(p);
}
template <int N, class T>
NORMJAX_INLINE Vector<float, N> floats(const T* p, Part part) {
#if defined(__AVX__)
  if constexpr (std::is_same_v<T, float> && N == 8) {
    return _mm256_maskload_ps(p, bits_of<__m256i>(counted<Vector<float, 8>>(part)));
  }
  if constexpr (std::is_same_v<T, float> && N == 4) {
    return _mm_maskload_ps(p, bits_of<__m128i>(counted<Vector<float, 4>>(part)));
  }
#endif
  T lanes[N];
  NORMJAX_UNROLLED for (int i = 0; i < N; ++i) lanes[i] = i < part.count ? p[i] : T();
  return widened<N>(lanes);
}

template <bool Past, int N, class T>
NORMJAX_INLINE void put(T* p, Vector<float, N> v, Whole) {
  if constexpr (Past) write_past(p, narrowed<N>(v, T()));
  else write(p, narrowed<N>(v, T()));
}
template <bool Past, int N, class T>
NORMJAX_INLINE void put(T* p, Vector<float, N> v, Part part) {
#if defined(__AVX__)
  if constexpr (std::is_same_v<T, float> && N == 8) {
    return _mm256_maskstore_ps(p, bits_of<__m256i>(counted<Vector<float, 8>>(part)), v);
  }
#endif
  T lanes[N];
  write(lanes, narrowed<N>(v, T()));
  NORMJAX_UNROLLED for (int i = 0; i < N; ++i) {
    if (i < part.count) p[i] = lanes[i];
  }
}

template <class V, class T, class Lanes = Whole>
NORMJAX_INLINE V load(const T* p, Lanes lanes = {}) {
  if constexpr (std::is_same_v<Element<V>, float>) return floats<kLanes<V>>(p, lanes);
  else return doubled<V>(floats<kLanes<V>>(p, lanes));
}
template <bool Past = false, class V, class T, class Lanes = Whole>
NORMJAX_INLINE void store(T* p, V v, Lanes lanes = {}) {
  constexpr int N = kLanes<V>;
  if constexpr (std::is_same_v<Element<V>, float>) put<Past, N>(p, v, lanes);
  else put<false, N>(p, __builtin_convertvector(v, Vector<float, N>), lanes);
}

// Of float64, which only sums are: their arrays have room for whole vectors.
template <class V>
NORMJAX_INLINE V load(const double* p) {
  return read<V>(p);
}
NORMJAX_INLINE void store(double* p, Doubles v) { write(p, v); }

template <class T>
NORMJAX_INLINE float first_of(const T* p) {
  return floats<4>(p, Part{1})[0];
}

// Adds a vector to sums in float64.
NORMJAX_INLINE void add_wide(double* to, Doubles v) { write(to, read<Doubles>(to) + v); }
NORMJAX_INLINE void add_wide(double* to, Floats v) {
  float lanes[kLanes<Floats>];
  write(lanes, v);
  add_wide(to, load<Doubles>(lanes));
  add_wide(to + kLanes<Doubles>, load<Doubles>(lanes + kLanes<Doubles>));
}

template <int I>
using Index = std::integral_constant<int, I>;

// Calls step(index, i, lanes) for the vectors of an array of n elements. Index goes round
// through U numbers known to the compiler: independent sums, one register each.
template <class V, class Step, int... U>
NORMJAX_INLINE void sweep(int64_t n, Step step, std::integer_sequence<int, U...>) {
  constexpr int64_t w = kLanes<V>, stride = w * sizeof...(U);
  int64_t i = 0;
  for (; i + stride <= n; i += stride) (step(Index<U>{}, i + U * w, Whole{}), ...);
  ((i + w <= n ? (step(Index<U>{}, i, Whole{}), i += w) : 0), ...);
  if (i < n) step(Index<0>{}, i, Part{static_cast<int>(n - i)});
}
template <class V, int U, class Step>
NORMJAX_INLINE void sweep(int64_t n, Step step) {
  sweep<V>(n, step, std::make_integer_sequence<int, U>());
}

// The sum of all lanes, in a fixed order.
template <class V>
NORMJAX_INLINE double total(V v) {
  double t = 0;
  NORMJAX_UNROLLED for (int i = 0; i < kLanes<V>; ++i) t += v[i];
  return t;
}
template <class V, int U>
NORMJAX_INLINE double total(const V (&sums)[U]) {
  V v = sums[0];
  NORMJAX_UNROLLED for (int u = 1; u < U; ++u) v += sums[u];
  return total(v);
}

}  // namespace normjax::NORMJAX_ISA
