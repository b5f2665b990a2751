// The kernels of one instruction set: compiled once for each, with NORMJAX_ISA its name.
//
// Nothing here may leave a function that other sets share: the linker would keep one for
// all. So no containers and no strings of the standard library.
#include "columns.h"
#include "rows.h"

namespace normjax::NORMJAX_ISA {

// Moments and y of sets, by the kernel for their types and their shape.
bool forward(const Forward& f, Workers& workers) {
  const Shape& s = f.shape;
  if (s.size() == 0) {
    for (int64_t set = 0; set < s.sets(); ++set) {
      f.mean[set] = kOfNothing.mean, f.rest[set] = kOfNothing.rest, f.var[set] = kOfNothing.var;
    }
    return true;
  }
  const int64_t count = s.parameters * s.channels();
  const Parameter scale(f.scale, count, 1), bias(f.bias, count, -0.0f);
  if (!scale.data() || !bias.data()) return false;
  if (s.positions == 1) return forward_rows(f, scale.data(), bias.data(), workers);
  return forward_columns(f, scale.data(), bias.data(), workers);
}

bool backward(const Backward& b, Workers& workers) {
  const Shape& s = b.shape;
  const int64_t count = s.parameters * s.channels();
  if (s.size() == 0) {
    for (float* sums : {b.dscale, b.dbias}) {
      for (int64_t i = 0; sums && i < count; ++i) sums[i] = 0;
    }
    return true;
  }
  const Parameter scale(b.scale, count, 1);
  if (!scale.data()) return false;
  if (s.positions == 1) return backward_rows(b, scale.data(), workers);
  return backward_columns(b, scale.data(), workers);
}

}  // namespace normjax::NORMJAX_ISA
