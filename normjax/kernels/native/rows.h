// Norms of rows, S = 1: layer and rms norm, and those of groups of features.
//
// A row is read from memory once: for its sums, and then from cache for y or dx.
#pragma once

#include "moments.h"
#include "workspace.h"

namespace normjax::NORMJAX_ISA {

template <bool Centered, class X>
Sums row_sums(At at, int64_t n, double shift) {
  const auto x = place<X>(at);
  Doubles distances[4] = {}, squares[4] = {};
  sweep<Doubles, 4>(n, [&](auto u, int64_t i, auto lanes) NORMJAX_STEP {
    Doubles d = load<Doubles>(x + i, lanes);
    if constexpr (Centered) {
      d = filled(d, lanes, Doubles{} + shift) - shift;
      distances[u] += d;
    }
    squares[u] += d * d;
  });
  return {total(distances), total(squares)};
}

template <class Real, bool Past, class X, class Y>
void write_row(At of_x, const float* scale, const float* bias, At of_y, int64_t n,
               const Standard& s) {
  using V = Vec<Real>;
  const auto x = place<X>(of_x);
  const auto y = place<Y>(of_y);
  const Real mean = s.mean_in<Real>(), rstd = s.rstd, rest = s.rest_in<Real>() * s.rstd;
  sweep<V, 1>(n, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
    const V x_hat = (load<V>(x + i, lanes) - mean) * rstd - rest;
    store<Past>(y + i, x_hat * load<V>(scale + i, lanes) + load<V>(bias + i, lanes), lanes);
  });
}

class ForwardRows {
 public:
  ForwardRows(const Forward& f, const float* scale, const float* bias)
      : f_(f), s_(f.shape), scale_(scale), bias_(bias) {
    sums_ = of_type(f.x.type, [&](auto x) {
      using X = decltype(x);
      return f.centered ? &row_sums<true, X> : &row_sums<false, X>;
    });
    const bool past = goes_past(f.y, f.shape.size(), f.shape.width, kBytes);
    plain_ = of_types(f.x.type, f.y.type, [=](auto x, auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      return past ? &write_row<float, true, X, Y> : &write_row<float, false, X, Y>;
    });
    wide_ = &write_row<double, false, Any, Any>;
  }

  void operator()(int64_t set) const {
    const int64_t n = s_.width;
    const At x = At(f_.x) + set * n;
    const double shift = f_.centered ? shift_of(x.first()) : 0;
    const Moments m = moments_of(sums_(x, n, shift), shift, n, f_.centered);
    f_.mean[set] = m.mean, f_.rest[set] = m.rest, f_.var[set] = m.var;
    const Standard s = standard_of(m, f_.epsilon);
    const int64_t k = s_.row_of(set / s_.groups) * s_.channels() + set % s_.groups * n;
    (s.is_plain() ? plain_ : wide_)(x, scale_ + k, bias_ + k, At(f_.y) + set * n, n, s);
  }

 private:
  const Forward& f_;
  const Shape& s_;
  const float *scale_, *bias_;
  Sums (*sums_)(At, int64_t, double);
  void (*plain_)(At, const float*, const float*, At, int64_t, const Standard&);
  decltype(plain_) wide_;
};

inline bool forward_rows(const Forward& f, const float* scale, const float* bias,
                         Workers& workers) {
  const ForwardRows row(f, scale, bias);
  const int64_t rows = f.shape.sets(), of_task = ceil_div(kTask, f.shape.width);
  parallel(workers, ceil_div(rows, of_task), f.shape.size(), [&](int64_t t, int64_t) {
    const int64_t end = least(rows, (t + 1) * of_task);
    for (int64_t set = t * of_task; set < end; ++set) row(set);
    end_writing_past();
  });
  return true;
}

// A row in the backward pass, and its sums: the averages of dy * scale, and of that times
// x_hat.
struct Row {
  At x, dy, dx;
  Standard s;
  double a = 0, c = 0;
};

// Values of a row whose products are summed in float32, a few to each lane.
constexpr int64_t kRowBlock = 4096;

// Of R rows that have the same parameters, together, with what they add to dscale and
// dbias.
template <class Real, int R, class X, class DY>
void row_averages(Row* rows, const float* scale, float* dscale, float* dbias, int64_t n) {
  using V = Vec<Real>;
  Place<X> x[R];
  Place<DY> dy[R];
  Real mean[R], rstd[R], rest[R];
  NORMJAX_UNROLLED for (int r = 0; r < R; ++r) {
    const Standard& s = rows[r].s;
    x[r] = place<X>(rows[r].x), dy[r] = place<DY>(rows[r].dy);
    mean[r] = s.mean_in<Real>(), rstd[r] = s.rstd, rest[r] = s.rest_in<Real>() * s.rstd;
  }
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    V a[R] = {}, c[R] = {};
    sweep<V, 1>(least(kRowBlock, n - begin), [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
      const int64_t k = begin + i;
      const V of_scale = load<V>(scale + k, lanes);
      V ds = load<V>(dscale + k, lanes), db = load<V>(dbias + k, lanes);
      NORMJAX_UNROLLED for (int r = 0; r < R; ++r) {
        const V d = filled(load<V>(x[r] + k, lanes), lanes, V{} + mean[r]) - mean[r];
        const V x_hat = d * rstd[r] - rest[r];
        const V g = load<V>(dy[r] + k, lanes), scaled = g * of_scale;
        ds += g * x_hat;
        db += g;
        a[r] += scaled;
        c[r] += scaled * x_hat;
      }
      store(dscale + k, ds, lanes);
      store(dbias + k, db, lanes);
    });
    NORMJAX_UNROLLED for (int r = 0; r < R; ++r) {
      rows[r].a += total(a[r]) / n;
      rows[r].c += total(c[r]) / n;
    }
  }
}

template <class Real, bool Past, class X, class DY>
void write_dx_row(const Row& row, const float* scale, int64_t n) {
  using V = Vec<Real>;
  const auto x = place<X>(row.x), dx = place<X>(row.dx);
  const auto dy = place<DY>(row.dy);
  const Correction correction = correction_of<Real>(row.s, row.a, row.c);
  const Real mean = row.s.mean_in<Real>(), rstd = row.s.rstd;
  const Real slope = correction.slope, offset = correction.offset;
  sweep<V, 1>(n, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
    const V d = load<V>(x + i, lanes) - mean;
    const V scaled = load<V>(dy + i, lanes) * load<V>(scale + i, lanes);
    store<Past>(dx + i, scaled * rstd + (d * slope + offset), lanes);
  });
}

class BackwardRows {
 public:
  BackwardRows(const Backward& b, const float* scale) : b_(b), s_(b.shape), scale_(scale) {
    const Type x = b.x.type, dy = b.dy.type;
    of_two_ = of_types(x, dy, [](auto t, auto u) {
      return &row_averages<float, 2, decltype(t), decltype(u)>;
    });
    of_one_ = of_types(x, dy, [](auto t, auto u) {
      return &row_averages<float, 1, decltype(t), decltype(u)>;
    });
    wide_ = &row_averages<double, 1, Any, Any>;
    const bool past = goes_past(b.dx, b.shape.size(), b.shape.width, kBytes);
    write_ = of_types(x, dy, [=](auto t, auto u) {
      using X = decltype(t);
      using DY = decltype(u);
      return past ? &write_dx_row<float, true, X, DY> : &write_dx_row<float, false, X, DY>;
    });
    write_wide_ = &write_dx_row<double, false, Any, Any>;
  }

  // The samples from begin to end, few enough that their sums are good in float32.
  void operator()(int64_t begin, int64_t end, float* dscale, float* dbias) const {
    const float* scale = scale_ + s_.row_of(begin) * s_.channels();
    for (int64_t n = begin; n < end; n += 2) {
      for (int64_t g = 0; g < s_.groups; ++g) {
        const int64_t k = g * s_.width;
        const int count = n + 1 < end ? 2 : 1;
        of_samples(n, count, g, scale + k, dscale + k, dbias + k);
      }
    }
  }

 private:
  Row row(int64_t sample, int64_t group) const {
    const int64_t set = sample * s_.groups + group, at = set * s_.width;
    const Standard s = standard_of(b_.mean[set], b_.rest[set], b_.var[set], b_.epsilon);
    return {At(b_.x) + at, At(b_.dy) + at, At(b_.dx) + at, s};
  }

  void of_samples(int64_t sample, int count, int64_t group, const float* scale, float* dscale,
                  float* dbias) const {
    Row rows[2] = {row(sample, group), row(sample + count - 1, group)};
    if (count == 2 && rows[0].s.is_plain() && rows[1].s.is_plain()) {
      of_two_(rows, scale, dscale, dbias, s_.width);
    } else {
      for (int r = 0; r < count; ++r) {
        (rows[r].s.is_plain() ? of_one_ : wide_)(rows + r, scale, dscale, dbias, s_.width);
      }
    }
    for (int r = 0; r < count; ++r) write(rows[r], scale);
  }

  void write(Row& row, const float* scale) const {
    if (!b_.centered) row.a = 0;
    const bool is_plain =
        row.s.is_plain() && correction_of<float>(row.s, row.a, row.c).is_plain();
    (is_plain ? write_ : write_wide_)(row, scale, s_.width);
  }

  const Backward& b_;
  const Shape& s_;
  const float* scale_;
  void (*of_two_)(Row*, const float*, float*, float*, int64_t);
  decltype(of_two_) of_one_, wide_;
  void (*write_)(const Row&, const float*, int64_t);
  decltype(write_) write_wide_;
};

// Adds sums in float32 to those in float64, and clears them.
inline void flush(float* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<Doubles>) {
    store(to + i, load<Doubles>(to + i) + load<Doubles>(from + i));
    store(from + i, Doubles{});
  }
}

inline bool backward_rows(const Backward& b, const float* scale, Workers& workers) {
  // Samples whose dscale and dbias are summed in float32.
  constexpr int64_t kBlock = 32;
  const int64_t length = padded(b.shape.channels());
  const BackwardRows rows(b, scale);
  const Chunks chunks(b.shape);
  const ParameterSums sums(b, chunks, workers);
  const Memory<float> blocks(2 * length * workers.count());
  if (!sums.ok() || !blocks.data()) return false;
  for (int64_t i = 0; i < 2 * length * workers.count(); ++i) blocks.data()[i] = 0;
  chunks.run(workers, b.shape.size(), [&](int64_t chunk, int64_t worker) {
    float* of_block = blocks.data() + 2 * length * worker;
    double* of_chunk = sums.open(chunk, worker);
    const int64_t end = chunks.end(chunk);
    for (int64_t n = chunks.begin(chunk); n < end; n += kBlock) {
      rows(n, least(end, n + kBlock), of_block, of_block + length);
      flush(of_block, of_chunk, 2 * length);
    }
    sums.close(chunk, of_chunk);
    end_writing_past();
  });
  sums.finish();
  return true;
}

}  // namespace normjax::NORMJAX_ISA
