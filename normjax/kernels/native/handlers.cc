// The handlers that XLA calls: they check what they are given, and choose the kernels by
// the instruction set of the machine.
#include <optional>
#include <string>

#include "problem.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace normjax {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Out = ffi::Result<AnyBuffer>;
using Dims = AnyBuffer::Dimensions;

struct Kernels {
  bool (*forward)(const Forward&, Workers&);
  bool (*backward)(const Backward&, Workers&);
};

Kernels chosen() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return {v4::forward, v4::backward};
  if (__builtin_cpu_supports("x86-64-v3")) return {v3::forward, v3::backward};
#endif
  return {base::forward, base::backward};
}

const Kernels& kernels() {
  static const Kernels of_machine = chosen();
  return of_machine;
}

// What is wrong with a call: the first complaint.
class Check {
 public:
  void that(bool holds, const std::string& name, const std::string& rule) {
    if (!holds && wrong_.empty()) wrong_ = "normjax: " + name + " must " + rule;
  }
  bool failed() const { return !wrong_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(wrong_); }

  Array array(const char* name, const AnyBuffer& b) {
    switch (b.element_type()) {
      case ffi::DataType::F32: return {b.untyped_data(), Type::kFloat32};
      case ffi::DataType::BF16: return {b.untyped_data(), Type::kBfloat16};
      case ffi::DataType::F16: return {b.untyped_data(), Type::kFloat16};
      default: that(false, name, "be float32, bfloat16 or float16"); return {};
    }
  }
  float* floats(const char* name, const AnyBuffer& b) {
    that(b.element_type() == ffi::DataType::F32, name, "be float32");
    return static_cast<float*>(b.untyped_data());
  }
  void shape(const char* name, const AnyBuffer& b, std::initializer_list<int64_t> expected) {
    const Dims dims = b.dimensions();
    const bool same = std::equal(dims.begin(), dims.end(), expected.begin(), expected.end());
    if (!same) that(false, name, "be of shape " + text(expected) + ", and is " + text(dims));
  }

 private:
  template <class Sizes>
  static std::string text(const Sizes& sizes) {
    std::string t = "[";
    for (int64_t size : sizes) t += (t.size() > 1 ? ", " : "") + std::to_string(size);
    return t + "]";
  }
  std::string wrong_;
};

bool is_absent(const AnyBuffer& b) {
  return b.dimensions().size() == 1 && b.dimensions()[0] == 0;
}

// The shape that x and the parameters have together; any of them may be absent.
Shape shape_of(Check& check, const AnyBuffer& x, std::initializer_list<AnyBuffer> parameters) {
  Shape s;
  check.that(x.dimensions().size() == 4, "x", "be of shape [N, S, G, K]");
  if (check.failed()) return s;
  const Dims dims = x.dimensions();
  s.samples = dims[0], s.positions = dims[1], s.groups = dims[2], s.width = dims[3];
  for (const AnyBuffer& p : parameters) {
    if (is_absent(p)) continue;
    check.that(p.dimensions().size() == 3, "a parameter", "be of shape [P, G, K]");
    if (check.failed()) return s;
    s.parameters = p.dimensions()[0];
  }
  check.that(is_valid(s), "x", "be of sizes that memory can hold, and P divide N");
  return s;
}

Array parameter(Check& check, const char* name, const AnyBuffer& p, const Shape& s) {
  if (is_absent(p)) return {};
  check.shape(name, p, {s.parameters, s.groups, s.width});
  return check.array(name, p);
}

float* sums(Check& check, const char* name, const AnyBuffer& b, bool wanted, const Shape& s) {
  if (wanted) check.shape(name, b, {s.parameters, s.groups, s.width});
  else check.shape(name, b, {0});
  float* data = check.floats(name, b);
  return wanted ? data : nullptr;
}

// The moments of x, each [N, G]: of the forward kernel results, of the backward operands.
float* moments(Check& check, const char* name, const AnyBuffer& b, const Shape& s) {
  check.shape(name, b, {s.samples, s.groups});
  return check.floats(name, b);
}

void like_x(Check& check, const char* name, const AnyBuffer& b, const Shape& s) {
  check.shape(name, b, {s.samples, s.positions, s.groups, s.width});
}

ffi::Error result(bool done) {
  if (done) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "normjax: out of memory");
}

ffi::Error forward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer bias, Out y,
                   Out mean, Out rest, Out var, double epsilon, bool centered) {
  Check check;
  Forward f;
  f.shape = shape_of(check, x, {scale, bias});
  if (check.failed()) return check.error();
  const Shape& s = f.shape;
  f.x = check.array("x", x), f.y = check.array("y", *y);
  like_x(check, "y", *y, s);
  f.scale = parameter(check, "scale", scale, s), f.bias = parameter(check, "bias", bias, s);
  f.mean = moments(check, "mean", *mean, s);
  f.rest = moments(check, "rest", *rest, s);
  f.var = moments(check, "var", *var, s);
  f.epsilon = epsilon, f.centered = centered;
  if (check.failed()) return check.error();
  PoolWorkers<ffi::ThreadPool> workers(pool);
  return result(kernels().forward(f, workers));
}

// The moments alone, of columns: for a y that XLA computes together with what follows.
ffi::Error moments_of(ffi::ThreadPool pool, AnyBuffer x, Out mean, Out rest, Out var,
                      bool centered) {
  Check check;
  Forward f;
  f.shape = shape_of(check, x, {});
  if (check.failed()) return check.error();
  const Shape& s = f.shape;
  check.that(s.positions != 1, "x", "have columns of more values than one");
  f.x = check.array("x", x);
  f.mean = moments(check, "mean", *mean, s);
  f.rest = moments(check, "rest", *rest, s);
  f.var = moments(check, "var", *var, s);
  f.epsilon = 1, f.centered = centered;
  if (check.failed()) return check.error();
  PoolWorkers<ffi::ThreadPool> workers(pool);
  return result(kernels().forward(f, workers));
}

ffi::Error backward(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer scale, AnyBuffer mean,
                    AnyBuffer rest, AnyBuffer var, AnyBuffer dy, Out dx, Out dscale, Out dbias,
                    double epsilon, bool centered, bool has_bias) {
  Check check;
  Backward b;
  // Of an absent scale, dbias tells how many rows of parameters there are.
  b.shape = has_bias ? shape_of(check, x, {scale, *dbias}) : shape_of(check, x, {scale});
  if (check.failed()) return check.error();
  const Shape& s = b.shape;
  b.x = check.array("x", x), b.dx = check.array("dx", *dx), b.dy = check.array("dy", dy);
  check.that(b.x.type == b.dx.type, "dx", "have the dtype of x");
  like_x(check, "dx", *dx, s);
  like_x(check, "dy", dy, s);
  b.scale = parameter(check, "scale", scale, s);
  b.mean = moments(check, "mean", mean, s);
  b.rest = moments(check, "rest", rest, s);
  b.var = moments(check, "var", var, s);
  b.dscale = sums(check, "dscale", *dscale, !is_absent(scale), s);
  b.dbias = sums(check, "dbias", *dbias, has_bias, s);
  b.epsilon = epsilon, b.centered = centered;
  if (check.failed()) return check.error();
  PoolWorkers<ffi::ThreadPool> workers(pool);
  return result(kernels().backward(b, workers));
}

// The sums of dy * x_hat and of dy alone, for each sample, of columns: for a dx that XLA
// computes together with what follows.
ffi::Error sums_of(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer mean, AnyBuffer rest,
                   AnyBuffer var, AnyBuffer dy, Out products, Out of_dy, double epsilon,
                   bool centered) {
  Check check;
  Backward b;
  b.shape = shape_of(check, x, {});
  if (check.failed()) return check.error();
  b.shape.parameters = b.shape.samples;
  const Shape& s = b.shape;
  check.that(s.positions != 1, "x", "have columns of more values than one");
  b.x = check.array("x", x), b.dy = check.array("dy", dy), b.dx.type = b.x.type;
  like_x(check, "dy", dy, s);
  b.mean = moments(check, "mean", mean, s);
  b.rest = moments(check, "rest", rest, s);
  b.var = moments(check, "var", var, s);
  b.dscale = sums(check, "the sums of products", *products, true, s);
  b.dbias = sums(check, "the sums of dy", *of_dy, true, s);
  b.epsilon = epsilon, b.centered = centered;
  if (check.failed()) return check.error();
  PoolWorkers<ffi::ThreadPool> workers(pool);
  return result(kernels().backward(b, workers));
}

}  // namespace
}  // namespace normjax

// All that the library shows.
#define NORMJAX_SHOWN extern "C" __attribute__((visibility("default")))
NORMJAX_SHOWN XLA_FFI_Error* normjax_forward(XLA_FFI_CallFrame*);
NORMJAX_SHOWN XLA_FFI_Error* normjax_moments(XLA_FFI_CallFrame*);
NORMJAX_SHOWN XLA_FFI_Error* normjax_backward(XLA_FFI_CallFrame*);
NORMJAX_SHOWN XLA_FFI_Error* normjax_sums(XLA_FFI_CallFrame*);
// The version of XLA's interface that this was built for. An older runtime refuses it, and
// then has no CPU backend at all: whoever registers the handlers must look first.
NORMJAX_SHOWN const int32_t normjax_api_version[2];
const int32_t normjax_api_version[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

XLA_FFI_DEFINE_HANDLER_SYMBOL(normjax_forward, normjax::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Arg<xla::ffi::AnyBuffer>()   // scale
                                  .Arg<xla::ffi::AnyBuffer>()   // bias
                                  .Ret<xla::ffi::AnyBuffer>()   // y
                                  .Ret<xla::ffi::AnyBuffer>()   // mean
                                  .Ret<xla::ffi::AnyBuffer>()   // rest
                                  .Ret<xla::ffi::AnyBuffer>()   // var
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("centered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normjax_moments, normjax::moments_of,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Ret<xla::ffi::AnyBuffer>()   // mean
                                  .Ret<xla::ffi::AnyBuffer>()   // rest
                                  .Ret<xla::ffi::AnyBuffer>()   // var
                                  .Attr<bool>("centered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normjax_backward, normjax::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Arg<xla::ffi::AnyBuffer>()   // scale
                                  .Arg<xla::ffi::AnyBuffer>()   // mean
                                  .Arg<xla::ffi::AnyBuffer>()   // rest
                                  .Arg<xla::ffi::AnyBuffer>()   // var
                                  .Arg<xla::ffi::AnyBuffer>()   // dy
                                  .Ret<xla::ffi::AnyBuffer>()   // dx
                                  .Ret<xla::ffi::AnyBuffer>()   // dscale
                                  .Ret<xla::ffi::AnyBuffer>()   // dbias
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("centered")
                                  .Attr<bool>("has_bias"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(normjax_sums, normjax::sums_of,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Arg<xla::ffi::AnyBuffer>()   // mean
                                  .Arg<xla::ffi::AnyBuffer>()   // rest
                                  .Arg<xla::ffi::AnyBuffer>()   // var
                                  .Arg<xla::ffi::AnyBuffer>()   // dy
                                  .Ret<xla::ffi::AnyBuffer>()   // the sums of dy * x_hat
                                  .Ret<xla::ffi::AnyBuffer>()   // the sums of dy
                                  .Attr<double>("epsilon")
                                  .Attr<bool>("centered"));
