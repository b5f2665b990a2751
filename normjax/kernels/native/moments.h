// Moments of a set, and the numbers by which its values become x_hat.
#pragma once

#include <cfloat>
#include <cmath>

#include "lanes.h"

namespace normjax::NORMJAX_ISA {

// Sums over a set, of the distances to a shift and of their squares, in float64.
//
// The shift is the set's first element. Then the variance needs no second pass: what
// cancels in E[d**2] - E[d]**2 is at most n times the variance, since the first element
// itself is in the set, and n * 2**-53 is below float32's rounding up to 2**28 values.
// Values that are all alike have distances of exactly zero.
struct Sums {
  double distances = 0, squares = 0;
};

// A first element that is not finite would make the mean NaN where it is infinite.
inline double shift_of(double first) { return std::isfinite(first) ? first : 0; }

struct Moments {
  float mean, rest, var;
};

// A variance beyond float32 stands as minus that of the values in units of 2**96.
constexpr double kUnit = 0x1p-96;

inline float held(double var) {
  const float plain = static_cast<float>(var);
  if (plain < 0x1p127f || plain != plain) return plain;
  const float large = static_cast<float>(var * kUnit * kUnit);
  return -(large < FLT_MIN ? FLT_MIN : large);
}

inline Moments moments_of(Sums sums, double shift, int64_t count, bool centered) {
  const double n = static_cast<double>(count);
  if (!centered) return {0, 0, held(sums.squares / n)};
  const double mean = shift + sums.distances / n;
  double var = (sums.squares - sums.distances * (sums.distances / n)) / n;
  if (var < 0) var = 0;  // by rounding; NaN stays
  const float near = static_cast<float>(mean);
  const float rest = std::isfinite(near) ? static_cast<float>(mean - near) : 0;
  return {near, rest, held(var)};
}

// What is said of a set of no values.
constexpr Moments kOfNothing = {0, 0, 1};

// x_hat = (x - mean - rest) * rstd.
struct Standard {
  double mean, rest, rstd;

  // Whether float32 is safe: neither rstd nor its square, times numbers of ordinary
  // size, comes near the ends of float32, and distances to the mean are finite.
  // Elsewhere the kernels compute in float64, which costs twice the time or more: data
  // with a standard deviation above 1.6e7, or with one and an epsilon below 1e-15.
  // A NaN is one in both, and must not make others of its slab be computed otherwise.
  bool is_plain() const { return !(rstd <= 0x1p-24 || rstd >= 0x1p24); }

  // Of a kernel that computes in Real: the double path takes the mean in one.
  template <class Real>
  double mean_in() const {
    return std::is_same_v<Real, float> ? mean : mean + rest;
  }
  template <class Real>
  double rest_in() const {
    return std::is_same_v<Real, float> ? rest : 0;
  }
};

inline Standard standard_of(float mean, float rest, float var, double epsilon) {
  const double unit = var < 0 ? kUnit : 1;
  const double floored = epsilon * unit * unit;
  // Nothing is below the least float32: constants must not be divided by zero.
  const double of_values = std::fabs(static_cast<double>(var));
  const double rstd = unit / std::sqrt(of_values + (floored < FLT_MIN ? FLT_MIN : floored));
  return {mean, rest, rstd};
}
inline Standard standard_of(const Moments& m, double epsilon) {
  return standard_of(m.mean, m.rest, m.var, epsilon);
}

// What the rest of a mean, which is small, adds to a sum. Where the other factor is infinite
// it adds nothing, since it would be NaN, or an infinity of the wrong sign.
inline double part(double rest, double of) { return std::isfinite(of) ? rest * of : 0; }

// dx = rstd * (dy * scale - a - x_hat * c), with the last two terms gathered:
//    = dy * scale * rstd + (x - mean) * slope + offset.
struct Correction {
  double slope, offset;

  // As of `Standard::is_plain`.
  bool is_plain() const {
    return !(std::fabs(slope) >= 0x1p100 || std::fabs(offset) >= 0x1p100);
  }
};

template <class Real>
Correction correction_of(const Standard& s, double a, double c) {
  const double slope = -s.rstd * s.rstd * c;
  return {slope, -part(s.rest_in<Real>(), slope) - s.rstd * a};
}

}  // namespace normjax::NORMJAX_ISA
