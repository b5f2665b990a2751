// What a kernel is asked to do: shapes, arrays, and who works at it.
//
// Every norm is one operation on x of shape [N, S, G, K]: moments for each (n, g), taken
// over S and K, and parameters along (G, K), in P rows that divide the samples evenly.
#pragma once

#include <cstdint>

namespace normjax {

enum class Type { kFloat32, kBfloat16, kFloat16 };

// Numbers in 16 bits, which nothing here computes with: see lanes.h.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// An array by its first element; data is null where there is none.
struct Array {
  void* data = nullptr;
  Type type = Type::kFloat32;
};

struct Shape {
  int64_t samples = 0;    // N
  int64_t positions = 0;  // S
  int64_t groups = 0;     // G
  int64_t width = 0;      // K
  int64_t parameters = 1;  // P

  int64_t channels() const { return groups * width; }
  int64_t per_sample() const { return positions * channels(); }
  int64_t size() const { return samples * per_sample(); }
  int64_t per_set() const { return positions * width; }
  int64_t sets() const { return samples * groups; }
  int64_t samples_per_row() const { return samples / parameters; }
  int64_t row_of(int64_t sample) const { return sample / samples_per_row(); }
};

// Whether all sizes and their products are numbers of bytes that memory can hold, and
// the rows of parameters share the samples evenly.
inline bool is_valid(const Shape& s) {
  if (s.samples < 0 || s.positions < 0 || s.groups < 0 || s.width < 0) return false;
  if (s.parameters < 0 || (s.parameters == 0 && s.samples > 0)) return false;
  if (s.parameters > 0 && s.samples % s.parameters != 0) return false;
  const auto holds = [](int64_t bytes, int64_t a, int64_t b, int64_t c, int64_t d) {
    for (int64_t size : {a, b, c, d}) {
      // A size of 0 must not hide that the others are too large for one another.
      if (__builtin_mul_overflow(bytes, size ? size : 1, &bytes)) return false;
    }
    return true;
  };
  return holds(8, s.samples, s.positions, s.groups, s.width) &&
         holds(8, s.parameters, s.groups, s.width, 1);
}

struct Forward {
  Shape shape;
  Array x, scale, bias, y;  // without y, which columns may be, the moments alone
  float *mean, *rest, *var;  // [N, G]; the mean in two parts
  double epsilon;
  bool centered;
};

struct Backward {
  Shape shape;
  Array x, scale, dy, dx;  // without dx, which columns may be, the sums alone
  const float *mean, *rest, *var;
  float *dscale, *dbias;  // [P, G, K], or null
  double epsilon;
  bool centered;
};

// Runs tasks on several threads. Which thread runs which task changes from call to call,
// so no result may depend on it.
class Workers {
 public:
  using Task = void (*)(void* context, int64_t task, int64_t worker);

  explicit Workers(int64_t count) : count_(count < 1 ? 1 : count) {}
  // How many tasks run at once; a worker is a number below this.
  int64_t count() const { return count_; }
  // Returns when all tasks are done.
  virtual void run(int64_t tasks, Task task, void* context) = 0;

 protected:
  ~Workers() = default;

 private:
  int64_t count_;
};

// The kernels, compiled once for each of these instruction sets. False: out of memory.
#define NORMJAX_DECLARE(isa)                    \
  namespace isa {                               \
  bool forward(const Forward&, Workers&);       \
  bool backward(const Backward&, Workers&);     \
  }
NORMJAX_DECLARE(base)
NORMJAX_DECLARE(v3)
NORMJAX_DECLARE(v4)
#undef NORMJAX_DECLARE

}  // namespace normjax
