// Norms of columns, S > 1: batch, instance and group norm.
//
// A sample is a slab of S rows of C = G * K channels. It is cut into pieces, whose sums are
// taken by themselves and then added in order. Where there are samples enough for all
// workers each takes whole samples, so that the second reading of a slab finds it in
// cache; where not, all share the pieces of all samples. The sums are the same bits.
#pragma once

#include "moments.h"
#include "workspace.h"

namespace normjax::NORMJAX_ISA {

// Rows of a slab that fit a cache near the core, and how far ahead to prefetch.
struct Block {
  int64_t first, rows, stride, width, ahead;
};

// How a slab is read: as rows of `width` columns. Few channels that fill no vector are
// taken several positions at a time, so that width is a multiple of 16; the last row then
// may be a part of one.
struct Slab {
  int64_t channels, copies, width, padded, length, rows, pieces;
  // Rows of a block: few sums stay in registers for many rows, while what is written is
  // better written in order.
  int64_t rows_to_read, rows_to_write;

  explicit Slab(const Shape& s) : channels(s.channels()), length(s.per_sample()) {
    int64_t common = 16;
    while (channels % common) common /= 2;
    copies = channels * (16 / common) <= 2048 ? least(16 / common, s.positions) : 1;
    width = channels * copies;
    padded = normjax::NORMJAX_ISA::padded(width);
    rows = ceil_div(length, width);
    pieces = clamped(least(length >> 16, rows / 64), 1, 64);
    rows_to_read = clamped(4096 / width, 8, 32);
    rows_to_write = clamped(512 / width, 2, 32);
  }

  // Calls what(block) for the parts of a piece; the last row, where it is short, is one.
  template <class What>
  void blocks(int64_t piece, int64_t of_block, What what) const {
    const int64_t begin = rows * piece / pieces, end = rows * (piece + 1) / pieces;
    const int64_t last = length - (rows - 1) * width;
    const int64_t whole = end == rows && last < width ? end - 1 : end;
    // Columns are read across the rows, which the machine does not foresee: ask for the
    // next block. Of long rows it follows each one by itself.
    const int64_t ahead = width < 1024 ? of_block * width : 128;
    for (int64_t r = begin; r < whole; r += of_block) {
      what(Block{r * width, least(of_block, whole - r), width, width, ahead});
    }
    if (whole < end) what(Block{whole * width, 1, width, last, 0});
  }
};

// What is known of one sample while it is worked on. Arrays by column, of length `padded`.
class State {
 public:
  static int64_t doubles(const Slab& s) { return 1 + s.padded * (5 + 2 * s.pieces); }
  State(double* memory, const Slab& s)
      : plain_(memory), memory_(memory + 1), padded_(s.padded) {}

  // Whether the sample is worked on in float32: see `Standard::is_plain`.
  bool is_plain() const { return *plain_ != 0; }
  void set_plain(bool value) const { *plain_ = value; }
  double* shift() const { return memory_; }  // of the forward pass, by column
  double* rstd() const { return memory_; }   // of the backward pass, by group
  // The factors of y or dx, in float32 or float64: see `write_columns`.
  template <class Real>
  Real* factor(int i) const {
    return reinterpret_cast<Real*>(memory_ + (1 + i) * padded_);
  }
  // Two sums of each piece.
  double* sums(int64_t piece, int which) const {
    return memory_ + (5 + 2 * piece + which) * padded_;
  }
  double* total(int which) const { return sums(0, which); }
  void add_pieces(const Slab& s) const {
    for (int64_t piece = 1; piece < s.pieces; ++piece) {
      sweep<Doubles, 1>(2 * padded_, [&](auto, int64_t i, auto) NORMJAX_STEP {
        double* to = total(0) + i;
        store(to, load<Doubles>(to) + load<Doubles>(sums(piece, 0) + i));
      });
    }
  }
  // Of a channel, over the positions that share a row of the slab.
  double of_channel(const Slab& s, int which, int64_t channel) const {
    double t = 0;
    for (int64_t j = 0; j < s.copies; ++j) t += total(which)[j * s.channels + channel];
    return t;
  }

 private:
  double *plain_, *memory_;
  int64_t padded_;
};

// Repeats the first `channels` of an array for all copies.
template <class T>
void repeat(T* a, const Slab& s) {
  for (int64_t i = s.channels; i < s.width; ++i) a[i] = a[i - s.channels];
}

// Calls step(i, count, lanes) for strips of columns: of U vectors, and at the end of one.
template <class V, int U, class Step>
NORMJAX_INLINE void strips(int64_t width, Step step) {
  constexpr int64_t w = kLanes<V>;
  int64_t i = 0;
  for (; i + U * w <= width; i += U * w) step(i, Index<U>{}, Whole{});
  for (; i + w <= width; i += w) step(i, Index<1>{}, Whole{});
  if (i < width) step(i, Index<1>{}, Part{static_cast<int>(width - i)});
}

// A strip of an array by column, in registers.
template <class V, int U, class T>
NORMJAX_INLINE void load_strip(V (&to)[U], const T* from) {
  NORMJAX_UNROLLED for (int u = 0; u < U; ++u) to[u] = load<V>(from + u * kLanes<V>);
}
template <class V, int U, class T>
NORMJAX_INLINE void store_strip(T* to, const V (&from)[U]) {
  NORMJAX_UNROLLED for (int u = 0; u < U; ++u) store(to + u * kLanes<V>, from[u]);
}

// The vectors of a strip that fill a line of 64 bytes of the output: what is written past
// the caches must be whole lines.
template <class V, class T>
constexpr int kStrip = std::is_same_v<T, Any> ? 2 : 64 / (kLanes<V> * static_cast<int>(sizeof(T)));

// Adds the distances of a block to their shift, and the squares of the distances.
template <class X>
void add_distances(At at, Block b, const double* shift, double* distances, double* squares) {
  const auto x = place<X>(at);
  strips<Doubles, 4>(b.width, [&](int64_t i, auto count, auto lanes) NORMJAX_STEP {
    constexpr int U = count;
    Doubles from[U], d1[U], d2[U];
    load_strip(from, shift + i);
    load_strip(d1, distances + i);
    load_strip(d2, squares + i);
    for (int64_t r = 0; r < b.rows; ++r) {
      NORMJAX_UNROLLED for (int u = 0; u < U; ++u) {
        const int64_t k = r * b.stride + i + u * kLanes<Doubles>;
        if (u == 0) prefetch(x + k + b.ahead);
        const Doubles v = load<Doubles>(x + k, lanes);
        const Doubles d = filled(v, lanes, from[u]) - from[u];
        d1[u] += d;
        d2[u] += d * d;
      }
    }
    store_strip(distances + i, d1);
    store_strip(squares + i, d2);
  });
}

// y = (x - mean) * factor + term, each by column.
template <class Real, bool Past, class X, class Y>
void write_columns(At of_x, At of_y, Block b, const State& state) {
  using V = Vec<Real>;
  const auto x = place<X>(of_x);
  const auto y = place<Y>(of_y);
  strips<V, kStrip<V, Y>>(b.width, [&](int64_t i, auto count, auto lanes) NORMJAX_STEP {
    constexpr int U = count;
    V m[U], f[U], t[U];
    load_strip(m, state.factor<Real>(0) + i);
    load_strip(f, state.factor<Real>(1) + i);
    load_strip(t, state.factor<Real>(2) + i);
    for (int64_t r = 0; r < b.rows; ++r) {
      NORMJAX_UNROLLED for (int u = 0; u < U; ++u) {
        const int64_t at = r * b.stride + i + u * kLanes<V>;
        if (u == 0) prefetch(x + at + b.ahead);
        store<Past>(y + at, (load<V>(x + at, lanes) - m[u]) * f[u] + t[u], lanes);
      }
    }
  });
}

class ForwardColumns {
 public:
  ForwardColumns(const Forward& f, const float* scale, const float* bias)
      : f_(f), s_(f.shape), slab_(f.shape), scale_(scale), bias_(bias) {
    add_ = of_type(f.x.type, [](auto x) { return &add_distances<decltype(x)>; });
    const bool past = goes_past(f.y, s_.size(), slab_.width, 64);
    write_ = of_types(f.x.type, f.y.type, [=](auto x, auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      return past ? &write_columns<float, true, X, Y> : &write_columns<float, false, X, Y>;
    });
    write_wide_ = &write_columns<double, false, Any, Any>;
  }

  const Slab& slab() const { return slab_; }

  void begin(int64_t sample, const State& state) const {
    double* shift = state.shift();
    for (int64_t i = 0; i < slab_.padded; ++i) shift[i] = 0;
    if (!f_.centered) return;
    for (int64_t g = 0; g < s_.groups; ++g) {
      const double first = shift_of((x(sample) + g * s_.width).first());
      for (int64_t k = 0; k < s_.width; ++k) shift[g * s_.width + k] = first;
    }
    repeat(shift, slab_);
  }

  void add(int64_t sample, int64_t piece, const State& state) const {
    double *d1 = state.sums(piece, 0), *d2 = state.sums(piece, 1);
    for (int64_t i = 0; i < slab_.padded; ++i) d1[i] = d2[i] = 0;
    slab_.blocks(piece, slab_.rows_to_read, [&](Block b) {
      add_(x(sample) + b.first, b, state.shift(), d1, d2);
    });
  }

  // From the sums of all pieces, the moments and the factors of y.
  void finish(int64_t sample, const State& state) const {
    state.add_pieces(slab_);
    bool is_plain = true;
    for (int64_t g = 0; g < s_.groups; ++g) {
      const Standard s = moments(sample, g, state);
      is_plain = factors<float>(sample, g, s, state) && is_plain;
    }
    state.set_plain(is_plain);
    for (int64_t g = 0; !is_plain && g < s_.groups; ++g) {
      const int64_t set = sample * s_.groups + g;
      const Standard s = standard_of(f_.mean[set], f_.rest[set], f_.var[set], f_.epsilon);
      factors<double>(sample, g, s, state);
    }
    for (int i = 0; i < 3; ++i) {
      if (is_plain) repeat(state.factor<float>(i), slab_);
      else repeat(state.factor<double>(i), slab_);
    }
  }

  void write(int64_t sample, int64_t piece, const State& state) const {
    const At y = At(f_.y) + sample * slab_.length;
    const auto write = state.is_plain() ? write_ : write_wide_;
    slab_.blocks(piece, slab_.rows_to_write, [&](Block b) {
      write(x(sample) + b.first, y + b.first, b, state);
    });
    end_writing_past();
  }

 private:
  At x(int64_t sample) const { return At(f_.x) + sample * slab_.length; }

  Standard moments(int64_t sample, int64_t group, const State& state) const {
    Sums sums;
    for (int64_t c = group * s_.width; c < (group + 1) * s_.width; ++c) {
      sums.distances += state.of_channel(slab_, 0, c);
      sums.squares += state.of_channel(slab_, 1, c);
    }
    const double shift = state.shift()[group * s_.width];
    const Moments m = moments_of(sums, shift, s_.per_set(), f_.centered);
    const int64_t set = sample * s_.groups + group;
    f_.mean[set] = m.mean, f_.rest[set] = m.rest, f_.var[set] = m.var;
    return standard_of(m, f_.epsilon);
  }

  // Returns whether Real is wide enough for what it writes.
  template <class Real>
  bool factors(int64_t sample, int64_t group, const Standard& s, const State& state) const {
    const int64_t row = s_.row_of(sample) * slab_.channels;
    Real *mean = state.factor<Real>(0), *factor = state.factor<Real>(1);
    Real* term = state.factor<Real>(2);
    bool is_plain = s.is_plain();
    for (int64_t c = group * s_.width; c < (group + 1) * s_.width; ++c) {
      const double by = s.rstd * scale_[row + c];
      mean[c] = s.mean_in<Real>(), factor[c] = by;
      term[c] = bias_[row + c] - part(s.rest_in<Real>(), by);
      is_plain = is_plain && !(std::fabs(by) >= 0x1p100);
    }
    return is_plain;
  }

  const Forward& f_;
  const Shape& s_;
  const Slab slab_;
  const float *scale_, *bias_;
  void (*add_)(At, Block, const double*, double*, double*);
  void (*write_)(At, At, Block, const State&);
  decltype(write_) write_wide_;
};

// Whether whole samples, or chunks of them, keep all workers busy to the end.
inline bool fills(int64_t tasks, const Workers& workers) {
  const int64_t rounds = ceil_div(tasks, workers.count());
  return 5 * tasks >= 4 * rounds * workers.count();
}

inline bool forward_columns(const Forward& f, const float* scale, const float* bias,
                            Workers& workers) {
  const ForwardColumns work(f, scale, bias);
  const Slab& slab = work.slab();
  const int64_t samples = f.shape.samples, size = f.shape.size();
  const bool by_sample = slab.pieces == 1 || fills(samples, workers);
  const int64_t of_one = State::doubles(slab);
  const Memory<double> memory(of_one * (by_sample ? workers.count() : samples));
  if (!memory.data()) return false;
  const auto state = [&](int64_t i) { return State(memory.data() + i * of_one, slab); };
  if (by_sample) {
    const int64_t of_task = ceil_div(kTask, slab.length);
    parallel(workers, ceil_div(samples, of_task), size, [&](int64_t t, int64_t worker) {
      const State own = state(worker);
      for (int64_t n = t * of_task; n < least(samples, (t + 1) * of_task); ++n) {
        work.begin(n, own);
        for (int64_t p = 0; p < slab.pieces; ++p) work.add(n, p, own);
        work.finish(n, own);
        if (!f.y.data) continue;
        for (int64_t p = slab.pieces; p-- > 0;) work.write(n, p, own);
      }
    });
    return true;
  }
  const int64_t pieces = samples * slab.pieces;
  for (int64_t n = 0; n < samples; ++n) work.begin(n, state(n));
  parallel(workers, pieces, size, [&](int64_t t, int64_t) {
    work.add(t / slab.pieces, t % slab.pieces, state(t / slab.pieces));
  });
  for (int64_t n = 0; n < samples; ++n) work.finish(n, state(n));
  if (!f.y.data) return true;
  // What was read last is in cache still.
  parallel(workers, pieces, size, [&](int64_t t, int64_t) {
    const int64_t at = pieces - 1 - t;
    work.write(at / slab.pieces, at % slab.pieces, state(at / slab.pieces));
  });
  return true;
}

// Adds dy * (x - mean) and dy of a block, in float32 where Real is.
template <class Real, class X, class DY>
void add_products(At of_x, At of_dy, Block b, const State& state, double* products,
                  double* sums) {
  using V = Vec<Real>;
  const auto x = place<X>(of_x);
  const auto dy = place<DY>(of_dy);
  strips<V, 2>(b.width, [&](int64_t i, auto count, auto lanes) NORMJAX_STEP {
    constexpr int U = count, w = kLanes<V>;
    V m[U], p[U] = {}, q[U] = {};
    load_strip(m, state.factor<Real>(0) + i);
    for (int64_t r = 0; r < b.rows; ++r) {
      NORMJAX_UNROLLED for (int u = 0; u < U; ++u) {
        const int64_t at = r * b.stride + i + u * w;
        if (u == 0) {
          prefetch(x + at + b.ahead);
          prefetch(dy + at + b.ahead);
        }
        const V g = load<V>(dy + at, lanes);
        p[u] += g * (load<V>(x + at, lanes) - m[u]);
        q[u] += g;
      }
    }
    NORMJAX_UNROLLED for (int u = 0; u < U; ++u) {
      add_wide(products + i + u * w, p[u]);
      add_wide(sums + i + u * w, q[u]);
    }
  });
}

// dx = dy * factor + (x - mean) * slope + offset, each by column.
template <class Real, bool Past, class X, class DY>
void write_dx_columns(At of_x, At of_dy, At of_dx, Block b, const State& state) {
  using V = Vec<Real>;
  const auto x = place<X>(of_x);
  const auto dy = place<DY>(of_dy);
  const auto dx = place<X>(of_dx);
  strips<V, kStrip<V, X>>(b.width, [&](int64_t i, auto count, auto lanes) NORMJAX_STEP {
    constexpr int U = count;
    V m[U], f[U], s[U], o[U];
    load_strip(m, state.factor<Real>(0) + i);
    load_strip(f, state.factor<Real>(1) + i);
    load_strip(s, state.factor<Real>(2) + i);
    load_strip(o, state.factor<Real>(3) + i);
    for (int64_t r = 0; r < b.rows; ++r) {
      NORMJAX_UNROLLED for (int u = 0; u < U; ++u) {
        const int64_t at = r * b.stride + i + u * kLanes<V>;
        if (u == 0) {
          prefetch(x + at + b.ahead);
          prefetch(dy + at + b.ahead);
        }
        const V d = load<V>(x + at, lanes) - m[u];
        store<Past>(dx + at, load<V>(dy + at, lanes) * f[u] + (d * s[u] + o[u]), lanes);
      }
    }
  });
}

class BackwardColumns {
 public:
  BackwardColumns(const Backward& b, const float* scale)
      : b_(b), s_(b.shape), slab_(b.shape), scale_(scale) {
    const Type x = b.x.type, dy = b.dy.type;
    add_ = of_types(x, dy, [](auto t, auto u) {
      return &add_products<float, decltype(t), decltype(u)>;
    });
    add_wide_ = &add_products<double, Any, Any>;
    const bool past = goes_past(b.dx, s_.size(), slab_.width, 64);
    write_ = of_types(x, dy, [=](auto t, auto u) {
      using X = decltype(t);
      using DY = decltype(u);
      return past ? &write_dx_columns<float, true, X, DY> : &write_dx_columns<float, false, X, DY>;
    });
    write_wide_ = &write_dx_columns<double, false, Any, Any>;
  }

  const Slab& slab() const { return slab_; }

  void begin(int64_t sample, const State& state) const {
    bool is_plain = true;
    for (int64_t g = 0; g < s_.groups; ++g) {
      const int64_t set = sample * s_.groups + g;
      const Standard s = standard_of(b_.mean[set], b_.rest[set], b_.var[set], b_.epsilon);
      state.rstd()[g] = s.rstd;
      is_plain = is_plain && s.is_plain();
    }
    state.set_plain(is_plain);
    if (is_plain) means<float>(sample, state);
    else means<double>(sample, state);
  }

  void add(int64_t sample, int64_t piece, const State& state) const {
    double *products = state.sums(piece, 0), *of_dy = state.sums(piece, 1);
    for (int64_t i = 0; i < slab_.padded; ++i) products[i] = of_dy[i] = 0;
    const auto add = state.is_plain() ? add_ : add_wide_;
    slab_.blocks(piece, slab_.rows_to_read, [&](Block b) {
      add(x(sample) + b.first, dy(sample) + b.first, b, state, products, of_dy);
    });
  }

  // From the sums of all pieces what the sample adds to dscale and dbias, and the factors
  // of dx.
  void finish(int64_t sample, const State& state, double* dscale, double* dbias) const {
    state.add_pieces(slab_);
    if (state.is_plain()) add_up<float>(sample, state, dscale, dbias);
    else add_up<double>(sample, state, dscale, dbias);
    if (state.is_plain() && factors<float>(sample, state)) return;
    state.set_plain(false);
    means<double>(sample, state);
    factors<double>(sample, state);
  }

  void write(int64_t sample, int64_t piece, const State& state) const {
    const At dx = At(b_.dx) + sample * slab_.length;
    const auto write = state.is_plain() ? write_ : write_wide_;
    slab_.blocks(piece, slab_.rows_to_write, [&](Block b) {
      write(x(sample) + b.first, dy(sample) + b.first, dx + b.first, b, state);
    });
    end_writing_past();
  }

 private:
  At x(int64_t sample) const { return At(b_.x) + sample * slab_.length; }
  At dy(int64_t sample) const { return At(b_.dy) + sample * slab_.length; }

  Standard standard(int64_t sample, int64_t group, const State& state) const {
    const int64_t set = sample * s_.groups + group;
    return {b_.mean[set], b_.rest[set], state.rstd()[group]};
  }

  template <class Real>
  void means(int64_t sample, const State& state) const {
    Real* mean = state.factor<Real>(0);
    for (int64_t i = 0; i < slab_.padded; ++i) mean[i] = 0;
    for (int64_t g = 0; g < s_.groups; ++g) {
      const Real of_group = standard(sample, g, state).template mean_in<Real>();
      for (int64_t k = 0; k < s_.width; ++k) mean[g * s_.width + k] = of_group;
    }
    repeat(mean, slab_);
  }

  // Leaves the sums of dy * x_hat and of dy, by channel, in the state's totals.
  template <class Real>
  void add_up(int64_t sample, const State& state, double* dscale, double* dbias) const {
    for (int64_t g = 0; g < s_.groups; ++g) {
      const Standard s = standard(sample, g, state);
      for (int64_t c = g * s_.width; c < (g + 1) * s_.width; ++c) {
        const double of_dy = state.of_channel(slab_, 1, c);
        const double rest = part(s.rest_in<Real>(), of_dy);
        dscale[c] += state.total(0)[c] = s.rstd * (state.of_channel(slab_, 0, c) - rest);
        dbias[c] += state.total(1)[c] = of_dy;
      }
    }
  }

  // Returns whether Real can hold the factors.
  template <class Real>
  bool factors(int64_t sample, const State& state) const {
    const float* scale = scale_ + s_.row_of(sample) * slab_.channels;
    bool is_plain = true;
    for (int64_t g = 0; g < s_.groups; ++g) {
      double a = 0, c = 0;
      for (int64_t i = g * s_.width; i < (g + 1) * s_.width; ++i) {
        c += state.total(0)[i] * scale[i];
        a += state.total(1)[i] * scale[i];
      }
      const double n = s_.per_set();
      const Standard s = standard(sample, g, state);
      const Correction of = correction_of<Real>(s, b_.centered ? a / n : 0, c / n);
      is_plain = is_plain && of.is_plain();
      for (int64_t i = g * s_.width; i < (g + 1) * s_.width; ++i) {
        state.factor<Real>(1)[i] = s.rstd * scale[i];
        state.factor<Real>(2)[i] = of.slope;
        state.factor<Real>(3)[i] = of.offset;
      }
    }
    for (int i = 1; i < 4; ++i) repeat(state.factor<Real>(i), slab_);
    return is_plain;
  }

  const Backward& b_;
  const Shape& s_;
  const Slab slab_;
  const float* scale_;
  void (*add_)(At, At, Block, const State&, double*, double*);
  void (*write_)(At, At, At, Block, const State&);
  decltype(add_) add_wide_;
  decltype(write_) write_wide_;
};

inline bool backward_columns(const Backward& b, const float* scale, Workers& workers) {
  const BackwardColumns work(b, scale);
  const Slab& slab = work.slab();
  const Chunks chunks(b.shape);
  const ParameterSums sums(b, chunks, workers);
  const int64_t samples = b.shape.samples, size = b.shape.size();
  const bool by_chunk = slab.pieces == 1 || fills(chunks.count, workers);
  const int64_t of_one = State::doubles(slab);
  const Memory<double> memory(of_one * (by_chunk ? workers.count() : samples));
  if (!sums.ok() || !memory.data()) return false;
  const auto state = [&](int64_t i) { return State(memory.data() + i * of_one, slab); };
  const int64_t pieces = samples * slab.pieces;
  if (!by_chunk) {
    for (int64_t n = 0; n < samples; ++n) work.begin(n, state(n));
    parallel(workers, pieces, size, [&](int64_t t, int64_t) {
      work.add(t / slab.pieces, t % slab.pieces, state(t / slab.pieces));
    });
  }
  // One after the other, whichever way: the sums of a chunk are added in its order.
  const auto run = [&](int64_t chunk, int64_t worker) {
    double* dscale = sums.open(chunk, worker);
    double* dbias = dscale + padded(slab.channels);
    for (int64_t n = chunks.begin(chunk); n < chunks.end(chunk); ++n) {
      const State own = state(by_chunk ? worker : n);
      if (by_chunk) {
        work.begin(n, own);
        for (int64_t p = 0; p < slab.pieces; ++p) work.add(n, p, own);
      }
      work.finish(n, own, dscale, dbias);
      if (by_chunk && b.dx.data) {
        for (int64_t p = slab.pieces; p-- > 0;) work.write(n, p, own);
      }
    }
    sums.close(chunk, dscale);
  };
  if (by_chunk) {
    chunks.run(workers, size, run);
  } else {
    for (int64_t c = 0; c < chunks.count; ++c) run(c, 0);
  }
  if (!by_chunk && b.dx.data) {
    // What was read last is in cache still.
    parallel(workers, pieces, size, [&](int64_t t, int64_t) {
      const int64_t at = pieces - 1 - t;
      work.write(at / slab.pieces, at % slab.pieces, state(at / slab.pieces));
    });
  }
  sums.finish();
  return true;
}

}  // namespace normjax::NORMJAX_ISA
