// Norms of rows, S = 1: layer and rms norm, and those of groups of features.
//
// A row is read from memory once: for its sums, and then from cache for y or dx.
#pragma once

#include "moments.h"
#include "workspace.h"

namespace normjax::NORMJAX_ISA {

// A set of a problem: what lies at (n, g).
template <class T>
T* row_at(const Array& a, int64_t set, int64_t width) {
  return static_cast<T*>(a.data) + set * width;
}

template <bool Centered, class X>
Sums row_sums(const X* x, int64_t n, double shift) {
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

template <class Real, class X, class Y>
void write_row(const X* x, const float* scale, const float* bias, Y* y, int64_t n,
               const Standard& s) {
  using V = Vec<Real>;
  const Real mean = s.mean_in<Real>(), rstd = s.rstd, rest = s.rest_in<Real>() * s.rstd;
  sweep<V, 2>(n, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
    const V x_hat = (load<V>(x + i, lanes) - mean) * rstd - rest;
    store(y + i, x_hat * load<V>(scale + i, lanes) + load<V>(bias + i, lanes), lanes);
  });
}

template <class X, class Y>
void forward_row(const Forward& f, int64_t set, const float* scale, const float* bias) {
  const int64_t n = f.shape.width;
  const X* x = row_at<const X>(f.x, set, n);
  Y* y = row_at<Y>(f.y, set, n);
  const double shift = f.centered ? shift_of(first_of(x)) : 0;
  const Sums sums = f.centered ? row_sums<true>(x, n, shift) : row_sums<false>(x, n, shift);
  const Moments m = moments_of(sums, shift, n, f.centered);
  f.mean[set] = m.mean, f.rest[set] = m.rest, f.var[set] = m.var;
  const Standard s = standard_of(m, f.epsilon);
  if (s.is_plain()) write_row<float>(x, scale, bias, y, n, s);
  else write_row<double>(x, scale, bias, y, n, s);
}

template <class X, class Y>
bool forward_rows(const Forward& f, const float* scale, const float* bias, Workers& workers) {
  const Shape& s = f.shape;
  const int64_t rows = s.sets(), of_task = ceil_div(kTask, s.width);
  parallel(workers, ceil_div(rows, of_task), s.size(), [&](int64_t t, int64_t) {
    for (int64_t set = t * of_task; set < least(rows, (t + 1) * of_task); ++set) {
      const int64_t at = s.row_of(set / s.groups) * s.channels() + set % s.groups * s.width;
      forward_row<X, Y>(f, set, scale + at, bias + at);
    }
  });
  return true;
}

// Sums over a row for dx: of dy * scale, and of that times x_hat.
struct Averages {
  double a = 0, c = 0;
};

// Of R rows that have the same parameters, together, with what they add to dscale and
// dbias. In float32 where Real is: a lane's sum is of few values, and the rest in float64.
template <class Real, int R, class X, class DY>
void row_averages(const X* const (&x)[R], const DY* const (&dy)[R], const float* scale,
                  float* dscale, float* dbias, int64_t n, const Standard (&s)[R],
                  Averages (&averages)[R]) {
  using V = Vec<Real>;
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    V a[R][2] = {}, c[R][2] = {};
    sweep<V, 2>(least(kBlock, n - begin), [&](auto u, int64_t i, auto lanes) NORMJAX_STEP {
      const int64_t k = begin + i;
      const V of_scale = load<V>(scale + k, lanes);
      V ds = load<V>(dscale + k, lanes), db = load<V>(dbias + k, lanes);
      for (int r = 0; r < R; ++r) {
        const Real mean = s[r].template mean_in<Real>(), rstd = s[r].rstd;
        const Real rest = s[r].template rest_in<Real>() * s[r].rstd;
        const V d = filled(load<V>(x[r] + k, lanes), lanes, V{} + mean) - mean;
        const V x_hat = d * rstd - rest;
        const V g = load<V>(dy[r] + k, lanes), scaled = g * of_scale;
        ds += g * x_hat;
        db += g;
        a[r][u] += scaled;
        c[r][u] += scaled * x_hat;
      }
      store(dscale + k, ds, lanes);
      store(dbias + k, db, lanes);
    });
    for (int r = 0; r < R; ++r) {
      averages[r].a += total(a[r]) / n;
      averages[r].c += total(c[r]) / n;
    }
  }
}

template <class Real, class X, class DY>
void write_dx_row(const X* x, const DY* dy, const float* scale, X* dx, int64_t n,
                  const Standard& s, const Averages& of) {
  using V = Vec<Real>;
  const Correction correction = correction_of<Real>(s, of.a, of.c);
  const Real mean = s.mean_in<Real>(), rstd = s.rstd;
  const Real slope = correction.slope, offset = correction.offset;
  sweep<V, 2>(n, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
    const V d = load<V>(x + i, lanes) - mean;
    const V scaled = load<V>(dy + i, lanes) * load<V>(scale + i, lanes);
    store(dx + i, scaled * rstd + (d * slope + offset), lanes);
  });
}

// The rows of one group of features, for R samples from `sample` on.
template <class Real, int R, class X, class DY>
void backward_rows_of(const Backward& b, int64_t sample, int64_t group, const float* scale,
                      float* dscale, float* dbias) {
  const int64_t n = b.shape.width;
  const X* x[R];
  const DY* dy[R];
  Standard s[R];
  Averages of[R];
  for (int r = 0; r < R; ++r) {
    const int64_t set = (sample + r) * b.shape.groups + group;
    x[r] = row_at<const X>(b.x, set, n), dy[r] = row_at<const DY>(b.dy, set, n);
    s[r] = standard_of(b.mean[set], b.rest[set], b.var[set], b.epsilon);
  }
  if constexpr (R > 1 || std::is_same_v<Real, float>) {
    bool is_plain = true;
    for (int r = 0; r < R; ++r) is_plain = is_plain && s[r].is_plain();
    if (!is_plain) {
      for (int r = 0; r < R; ++r) {
        using One = std::conditional_t<R == 1, double, float>;
        backward_rows_of<One, 1, X, DY>(b, sample + r, group, scale, dscale, dbias);
      }
      return;
    }
  }
  row_averages<Real, R>(x, dy, scale, dscale, dbias, n, s, of);
  for (int r = 0; r < R; ++r) {
    X* dx = row_at<X>(b.dx, (sample + r) * b.shape.groups + group, n);
    if (!b.centered) of[r].a = 0;
    if (correction_of<Real>(s[r], of[r].a, of[r].c).is_plain()) {
      write_dx_row<Real>(x[r], dy[r], scale, dx, n, s[r], of[r]);
    } else {
      write_dx_row<double>(x[r], dy[r], scale, dx, n, s[r], of[r]);
    }
  }
}

// Adds sums in float32 to those in float64, and clears them.
inline void flush(float* from, double* to, int64_t n) {
  sweep<Doubles, 1>(n, [&](auto, int64_t i, auto lanes) NORMJAX_STEP {
    store(to + i, load<Doubles>(to + i, lanes) + load<Doubles>(from + i, lanes), lanes);
    store(from + i, Doubles{}, lanes);
  });
}

template <class X, class DY>
bool backward_rows(const Backward& b, const float* scale, Workers& workers) {
  // Rows whose dscale and dbias are summed in float32.
  constexpr int64_t kBlock = 32;
  const Shape& s = b.shape;
  const int64_t channels = s.channels();
  const Chunks chunks(s);
  const ParameterSums sums(b, chunks, workers);
  const Memory<float> blocks(2 * channels * workers.count());
  if (!sums.ok() || !blocks.data()) return false;
  for (int64_t i = 0; i < 2 * channels * workers.count(); ++i) blocks.data()[i] = 0;
  const auto run = [&](int64_t chunk, int64_t worker) {
    float* dscale = blocks.data() + 2 * channels * worker;
    float* dbias = dscale + channels;
    const float* of_row = scale + chunks.row(chunk) * channels;
    double* of_chunk = sums.open(chunk, worker);
    const int64_t end = chunks.end(chunk);
    for (int64_t n = chunks.begin(chunk); n < end; n += kBlock) {
      const int64_t stop = least(end, n + kBlock);
      for (int64_t i = n; i < stop; i += 2) {
        for (int64_t g = 0; g < s.groups; ++g) {
          const int64_t k = g * s.width;
          if (i + 1 < stop) {
            backward_rows_of<float, 2, X, DY>(b, i, g, of_row + k, dscale + k, dbias + k);
          } else {
            backward_rows_of<float, 1, X, DY>(b, i, g, of_row + k, dscale + k, dbias + k);
          }
        }
      }
      flush(dscale, of_chunk, channels);
      flush(dbias, of_chunk + channels, channels);
    }
    sums.close(chunk, of_chunk);
  };
  chunks.run(workers, s.size(), run);
  sums.finish();
  return true;
}

}  // namespace normjax::NORMJAX_ISA
