// Memory of a call, and its division into tasks.
#pragma once

#include <cstdlib>

#include "lanes.h"

namespace normjax::NORMJAX_ISA {

// An array for the time of a call; null where memory is out. Not a std::vector: what the
// compiler makes of that for one instruction set, the linker may share with another.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) {
    int64_t bytes;
    if (__builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes)) return;
    data_ = static_cast<T*>(std::malloc(bytes > 0 ? bytes : 1));
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// What what(T()) returns, with the C++ type of an array's elements; of two arrays, what
// what(T(), U()) does. Only the loops over elements know their types: see `At`.
template <class What>
auto of_type(Type type, What what) {
  switch (type) {
    case Type::kBfloat16: return what(Bfloat16());
    case Type::kFloat16: return what(Float16());
    default: return what(float());
  }
}
template <class What>
auto of_types(Type first, Type second, What what) {
  return of_type(first, [=](auto t) {
    return of_type(second, [=](auto u) { return what(t, u); });
  });
}

// A place in an array of a type that is known when it runs.
struct At {
  char* data = nullptr;
  Type type = Type::kFloat32;

  At() = default;
  explicit At(const Array& a) : data(static_cast<char*>(a.data)), type(a.type) {}
  At operator+(int64_t elements) const {
    At to = *this;
    to.data += elements * size();
    return to;
  }
  int64_t size() const { return type == Type::kFloat32 ? 4 : 2; }
  // Whether rows of so many bytes begin at multiples of `unit`.
  bool is_aligned(int64_t row_bytes, int64_t unit) const {
    return (reinterpret_cast<uintptr_t>(data) | row_bytes) % unit == 0;
  }
  double first() const {
    return of_type(type, [&](auto t) { return first_of(reinterpret_cast<decltype(t)*>(data)); });
  }
};

// The wide path, which is rare, is compiled once for all types: of elements that are Any,
// a place is no pointer but an At, and each vector asks for its type.
struct Any {};
template <class T>
using Place = std::conditional_t<std::is_same_v<T, Any>, At, T*>;
template <class T>
Place<T> place(const At& at) {
  if constexpr (std::is_same_v<T, Any>) return at;
  else return reinterpret_cast<T*>(at.data);
}

template <class V, class Lanes>
V load(const At& at, Lanes lanes) {
  return of_type(at.type, [&](auto t) { return load<V>(place<decltype(t)>(at), lanes); });
}
template <bool Past, class V, class Lanes>
void store(const At& at, V v, Lanes lanes) {
  of_type(at.type, [&](auto t) { store<Past>(place<decltype(t)>(at), v, lanes); });
}
template <class T>
NORMJAX_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p);
}
inline void prefetch(const At&) {}

// A parameter in float32: as it lies there, or converted, or where there is none,
// `absent`.
class Parameter {
 public:
  Parameter(const Array& of, int64_t count, float absent)
      : own_(is_plain(of) ? 0 : count), data_(own_.data()) {
    if (is_plain(of)) {
      data_ = static_cast<const float*>(of.data);
    } else if (own_.data() && !of.data) {
      for (int64_t i = 0; i < count; ++i) own_.data()[i] = absent;
    } else if (own_.data()) {
      of_type(of.type, [&](auto t) {
        const auto* p = static_cast<const decltype(t)*>(of.data);
        sweep<Floats, 1>(count, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
          store(own_.data() + i, load<Floats>(p + i, lanes), lanes);
        });
      });
    }
  }
  const float* data() const { return data_; }

 private:
  static bool is_plain(const Array& a) { return a.data && a.type == Type::kFloat32; }
  Memory<float> own_;
  const float* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamped(int64_t v, int64_t low, int64_t high) { return most(low, least(v, high)); }

// The length of an array of sums, which is read and written in whole vectors.
inline int64_t padded(int64_t n) { return ceil_div(n, 16) * 16; }

// Elements below which waking another thread costs more than it saves.
constexpr int64_t kAlone = 1 << 15;
// Elements of a task, where tasks may be of any size.
constexpr int64_t kTask = 1 << 15;

// Whether to write an output past the caches, which it would only flush: see `write_past`.
inline bool goes_past(const Array& a, int64_t count, int64_t row, int64_t unit) {
  constexpr int64_t kLarge = 8 << 20;  // bytes
  const At at(a);
  return count * at.size() >= kLarge && at.is_aligned(row * at.size(), unit);
}

// Runs task(t, worker) for all t, which together touch so many elements.
template <class Fn>
void parallel(Workers& workers, int64_t tasks, int64_t elements, Fn task) {
  if (tasks <= 1 || elements < kAlone || workers.count() == 1) {
    for (int64_t t = 0; t < tasks; ++t) task(t, int64_t{0});
    return;
  }
  const auto call = [](void* context, int64_t t, int64_t worker) {
    (*static_cast<Fn*>(context))(t, worker);
  };
  workers.run(tasks, call, &task);
}

// Samples in chunks, each with sums of its own for dscale and dbias. The chunks depend on
// the shape alone, and so do the bits of the sums.
struct Chunks {
  int64_t per_row, count, of_row;  // chunks and samples of a row of parameters

  explicit Chunks(const Shape& s) {
    const int64_t enough = ceil_div(1 << 17, most(1, s.per_sample()));
    of_row = s.parameters ? s.samples_per_row() : 0;
    // Of wide samples more, so that sums are few beside the samples they sum.
    const int64_t samples = most(enough, s.positions < 64 ? 8 : 1);
    per_row = clamped(of_row / samples, 1, 64);
    count = s.parameters * per_row;
  }
  int64_t row(int64_t chunk) const { return chunk / per_row; }
  int64_t begin(int64_t chunk) const {
    return row(chunk) * of_row + of_row * (chunk % per_row) / per_row;
  }
  int64_t end(int64_t chunk) const {
    return row(chunk) * of_row + of_row * (chunk % per_row + 1) / per_row;
  }

  // Runs what(chunk, worker) for all chunks. Where each sample has parameters of its own
  // they may be many and small: a task is of several.
  template <class What>
  void run(Workers& workers, int64_t elements, What what) const {
    const int64_t of_task = ceil_div(kTask, most(1, elements / most(1, count)));
    parallel(workers, ceil_div(count, of_task), elements, [&](int64_t t, int64_t worker) {
      for (int64_t c = t * of_task; c < least(count, (t + 1) * of_task); ++c) what(c, worker);
    });
  }
};

// dscale and dbias: float64 sums of each chunk, and from them those of each row.
class ParameterSums {
 public:
  ParameterSums(const Backward& b, const Chunks& chunks, const Workers& workers)
      : chunks_(chunks),
        channels_(b.shape.channels()),
        padded_(padded(channels_)),
        dscale_(b.dscale),
        dbias_(b.dbias),
        // A row of one chunk is written at once, and its sums need not be kept.
        sums_(2 * padded_ * (chunks.per_row > 1 ? chunks.count : workers.count())) {}
  bool ok() const { return sums_.data(); }

  // The sums of a chunk that a worker begins: dscale, and `padded` further dbias.
  double* open(int64_t chunk, int64_t worker) const {
    double* sums = at(chunks_.per_row > 1 ? chunk : worker);
    for (int64_t i = 0; i < 2 * padded_; ++i) sums[i] = 0;
    return sums;
  }
  void close(int64_t chunk, const double* sums) const {
    if (chunks_.per_row == 1) write(sums, chunks_.row(chunk));
  }
  // Once all chunks are closed.
  void finish() const {
    if (chunks_.per_row == 1) return;
    for (int64_t c = 0; c < chunks_.count; c += chunks_.per_row) write(at(c), chunks_.row(c));
  }

 private:
  double* at(int64_t slot) const { return sums_.data() + 2 * padded_ * slot; }
  void write(const double* first, int64_t row) const {
    if (dscale_) add_up(first, dscale_ + row * channels_);
    if (dbias_) add_up(first + padded_, dbias_ + row * channels_);
  }
  void add_up(const double* first, float* out) const {
    sweep<Doubles, 1>(channels_, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
      Doubles sum = {};
      for (int64_t j = 0; j < chunks_.per_row; ++j) {
        sum += load<Doubles>(first + 2 * padded_ * j + i);
      }
      store(out + i, sum, lanes);
    });
  }
  Chunks chunks_;
  int64_t channels_, padded_;
  float *dscale_, *dbias_;
  Memory<double> sums_;
};

}  // namespace normjax::NORMJAX_ISA
