// The CPU kernels by themselves, for a compiler's sanitizers: exits with 1 on a wrong
// result, and with the sanitizer's code on a fault.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
//     -DNORMJAX_ISA=base -I normjax/kernels/native tests/native_sanitized.cc
//     -o /tmp/native_sanitized -pthread
//
// Any instruction set that the machine has may be tested so, with its -march.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "kernels.cc"
#include "threads.h"

namespace {

using namespace normjax;
namespace isa = normjax::NORMJAX_ISA;

int failures = 0;

void expect(bool holds, const char* what, const Shape& s) {
  if (holds) return;
  ++failures;
  std::printf("failed: %s, of shape [%lld, %lld, %lld, %lld] with %lld rows\n", what,
              static_cast<long long>(s.samples), static_cast<long long>(s.positions),
              static_cast<long long>(s.groups), static_cast<long long>(s.width),
              static_cast<long long>(s.parameters));
}

// A pool that gives helpers a thread at once, or late, or never.
class Pool {
 public:
  explicit Pool(int64_t threads, bool starts = true) : threads_(threads), starts_(starts) {}
  ~Pool() {
    for (auto& t : running_) t.join();
    for (auto& f : waiting_) f();  // when the call they were for is long over
  }
  int64_t num_threads() const { return threads_; }
  void Schedule(std::function<void()> f) {
    if (starts_) running_.emplace_back(std::move(f));
    else waiting_.push_back(std::move(f));
  }

 private:
  const int64_t threads_;
  const bool starts_;
  std::vector<std::thread> running_;
  std::vector<std::function<void()>> waiting_;
};

// An array that ends where its memory does, and begins at an odd place of it.
class Buffer {
 public:
  Buffer(Type type, int64_t count) : type_(type), bytes_(count * size() + size()) {}
  int64_t size() const { return type_ == Type::kFloat32 ? 4 : 2; }
  Array array() { return {bytes_.data() + size(), type_}; }
  float* floats() { return reinterpret_cast<float*>(bytes_.data() + size()); }
  const std::vector<char>& bytes() const { return bytes_; }
  void fill(std::mt19937& random, float scale) {
    std::normal_distribution<float> normal;
    char* p = bytes_.data() + size();
    for (; p < bytes_.data() + bytes_.size(); p += size()) {
      const float v = scale * normal(random);
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      const uint16_t half = type_ == Type::kBfloat16 ? bits >> 16 : 0x3c00 + (bits & 0x83ff);
      if (type_ == Type::kFloat32) std::memcpy(p, &bits, 4);
      else std::memcpy(p, &half, 2);
    }
  }

 private:
  Type type_;
  std::vector<char> bytes_;
};

struct Results {
  Buffer y, mean, rest, var, dx, dscale, dbias;
  Results(const Shape& s, Type x, Type y_type)
      : y(y_type, s.size()), mean(Type::kFloat32, s.sets()), rest(Type::kFloat32, s.sets()),
        var(Type::kFloat32, s.sets()), dx(x, s.size()),
        dscale(Type::kFloat32, s.parameters * s.channels()),
        dbias(Type::kFloat32, s.parameters * s.channels()) {}
  bool operator==(const Results& o) const {
    return y.bytes() == o.y.bytes() && mean.bytes() == o.mean.bytes() &&
           rest.bytes() == o.rest.bytes() && var.bytes() == o.var.bytes() &&
           dx.bytes() == o.dx.bytes() && dscale.bytes() == o.dscale.bytes() &&
           dbias.bytes() == o.dbias.bytes();
  }
};

struct Case {
  Shape shape;
  Type x, parameters, y;
  bool centered, has_scale, has_bias;
  float scale;
};

// The sums alone, without y and dx: the same moments, and what adds up to dbias.
void check_sums_alone(const Case& c, Forward f, Backward b, Results& r, Workers& workers) {
  Results own(c.shape, c.x, c.y);
  const int64_t n = c.shape.samples, channels = c.shape.channels();
  Buffer products(Type::kFloat32, n * channels), of_dy(Type::kFloat32, n * channels);
  f.scale = f.bias = f.y = Array{};
  f.mean = own.mean.floats(), f.rest = own.rest.floats(), f.var = own.var.floats();
  expect(isa::forward(f, workers), "moments alone", c.shape);
  const bool same = own.mean.bytes() == r.mean.bytes() && own.rest.bytes() == r.rest.bytes() &&
                    own.var.bytes() == r.var.bytes();
  expect(same, "moments alone are those beside y", c.shape);
  b.shape.parameters = n;
  b.scale = Array{}, b.dx = Array{nullptr, c.x};
  b.dscale = products.floats(), b.dbias = of_dy.floats();
  expect(isa::backward(b, workers), "sums alone", c.shape);
  if (!c.has_bias || c.shape.parameters != 1 || !c.shape.size()) return;
  for (int64_t i = 0; i < channels; ++i) {
    double sum = 0;
    float part, whole;
    for (int64_t s = 0; s < n; ++s) {
      std::memcpy(&part, of_dy.floats() + s * channels + i, 4);
      sum += part;
    }
    std::memcpy(&whole, r.dbias.floats() + i, 4);
    expect(std::fabs(sum - whole) <= 1e-4 * (1 + std::fabs(sum)), "sums of dy", c.shape);
  }
}

Results computed(const Case& c, Pool&& pool) {
  std::mt19937 random(7);
  const int64_t parameters = c.shape.parameters * c.shape.channels();
  Buffer x(c.x, c.shape.size()), dy(c.y, c.shape.size());
  Buffer scale(c.parameters, parameters), bias(c.parameters, parameters);
  x.fill(random, c.scale), dy.fill(random, 1);
  scale.fill(random, 1), bias.fill(random, 1);
  Results r(c.shape, c.x, c.y);
  PoolWorkers<Pool> workers(pool);
  const Array none, of_scale = c.has_scale ? scale.array() : none;
  const Array of_bias = c.has_bias ? bias.array() : none;
  Forward f = {c.shape, x.array(), of_scale, of_bias, r.y.array(), r.mean.floats(),
               r.rest.floats(), r.var.floats(), 1e-5, c.centered};
  expect(isa::forward(f, workers), "forward", c.shape);
  Backward b = {c.shape, x.array(), of_scale, dy.array(), r.dx.array(), r.mean.floats(),
                r.rest.floats(), r.var.floats(), c.has_scale ? r.dscale.floats() : nullptr,
                c.has_bias ? r.dbias.floats() : nullptr, 1e-5, c.centered};
  expect(isa::backward(b, workers), "backward", c.shape);
  if (c.shape.positions != 1) check_sums_alone(c, f, b, r, workers);
  return r;
}

// The moments, against sums in long double.
void check_moments(const Case& c, Results& r) {
  if (c.x != Type::kFloat32 || c.scale > 1e10f || !c.centered || !c.shape.per_set()) return;
  std::mt19937 random(7);
  Buffer x(c.x, c.shape.size());
  x.fill(random, c.scale);
  const Shape& s = c.shape;
  for (int64_t set = 0; set < s.sets(); ++set) {
    const float* first = x.floats() + set / s.groups * s.per_sample() + set % s.groups * s.width;
    long double sum = 0, squares = 0;
    for (int64_t p = 0; p < s.positions; ++p) {
      for (int64_t k = 0; k < s.width; ++k) {
        const long double v = first[p * s.channels() + k];
        sum += v, squares += v * v;
      }
    }
    const long double mean = sum / s.per_set(), var = squares / s.per_set() - mean * mean;
    float got_mean, got_var;
    std::memcpy(&got_mean, r.mean.floats() + set, 4);
    std::memcpy(&got_var, r.var.floats() + set, 4);
    expect(std::fabs(got_mean - mean) <= 1e-6 * c.scale, "mean", s);
    expect(std::fabs(got_var - var) <= 1e-6 * c.scale * c.scale, "var", s);
  }
}

void check(const Case& c) {
  Results alone = computed(c, Pool(1));
  check_moments(c, alone);
  expect(alone == computed(c, Pool(0)), "the same bits without threads", c.shape);
  if (c.shape.size() < isa::kAlone) return;
  expect(alone == computed(c, Pool(2)), "the same bits of 2 threads", c.shape);
  expect(alone == computed(c, Pool(5)), "the same bits of 5 threads", c.shape);
  expect(alone == computed(c, Pool(4, false)), "the same bits of no helper", c.shape);
}

}  // namespace

int main() {
  const Type types[] = {Type::kFloat32, Type::kBfloat16, Type::kFloat16};
  const Shape shapes[] = {
      {0, 3, 2, 5, 1},    {4, 0, 2, 5, 2},    {4, 3, 0, 5, 2},     {4, 3, 2, 0, 2},
      {0, 0, 0, 0, 0},    {1, 1, 1, 1, 1},    {7, 1, 1, 1, 7},     {5, 1, 3, 7, 5},
      {33, 1, 1, 17, 1},  {9, 1, 2, 31, 3},   {301, 1, 1, 129, 1}, {2, 1, 1, 40001, 1},
      {1, 2, 1, 1, 1},    {1, 1999, 3, 1, 1}, {1, 999, 65, 1, 1},  {6, 35, 5, 3, 2},
      {2, 3000, 33, 1, 1}, {1, 300, 1031, 1, 1}, {40, 9, 4, 8, 40},  {3, 70001, 1, 1, 1},
  };
  int64_t turn = 0;
  for (const Shape& s : shapes) {
    for (Type x : types) {
      for (Type y : types) {
        const Case c = {s, x, types[turn % 3], y, turn % 4 != 1, turn % 5 != 2, turn % 7 != 3,
                        turn % 11 == 5 && x != Type::kFloat16 ? 3e37f : 1.0f};
        check(c);
        ++turn;
      }
    }
  }
  const int64_t large = int64_t{1} << 31, most = std::numeric_limits<int64_t>::max();
  for (const Shape& s : {Shape{large, large, 1, 1, 1}, Shape{1, 1, 0, most, 1},
                         Shape{0, large, large, large, 1}, Shape{most, 1, 1, 1, 1},
                         Shape{-1, 1, 1, 1, 1}, Shape{3, 1, 1, 1, 2}, Shape{3, 1, 1, 1, 0},
                         Shape{1, 1, large, large, 1}}) {
    expect(!is_valid(s), "a shape beyond memory, or that does not divide, is refused", s);
  }
  for (const Shape& s : {Shape{large, 1, 1, 64, 1}, Shape{0, 1, 1, 64, 1}, Shape{4, 1, 1, 1, 2}}) {
    expect(is_valid(s), "a shape that memory can hold is taken", s);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
