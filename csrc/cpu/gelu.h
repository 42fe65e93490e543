// Both forms of GELU on vectors, and their slopes: what gelu and the encoder share.
#pragma once
#include "cpu/vec.h"

namespace fastbert::FASTBERT_ISA {
namespace {

// gelu = z * cdf, gelu' = cdf + z * pdf, of the normal distribution.
struct Erf {
  // 0.5 + z R(z^2): a rational minimax fit on |z| < 5.5, off by 7e-9 (1.8e-7 with the rounding of floats); 0 or 1 past it.
  static INLINE vf cdf(vf z) {
    const vf u = z * z;
    vf p = u * 2.2749333083993406e-08f + 6.352130640152609e-06f;
    vf q = u * 1.1975039342360105e-06f + 7.36479414626956e-05f;
    p = p * u + 0.00016882698400877416f;
    q = q * u + 0.0018844523001462221f;
    p = p * u + 0.004677268676459789f;
    q = q * u + 0.028645943850278854f;
    p = p * u + 0.033852770924568176f;
    q = q * u + 0.2515222430229187f;
    p = p * u + 0.398942232131958f;
    q = q * u + 1.f;
    const vf inside = z * (p / q) + 0.5f;
    return z > 5.5f ? splat(1.f) : (z < -5.5f ? vf{} : inside);
  }
  static INLINE vf value(vf z) { return z * cdf(z); }
  static INLINE vf slope(vf z) { return cdf(z) + z * exp(-0.5f * (z * z)) * 0.3989422804f; }
};

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (z + 0.044715 z^3).
struct Tanh {
  static INLINE vf sigmoid(vf z) { return 1.f / (1.f + exp(z * (-1.5957691216f - 0.0713548163f * (z * z)))); }
  static INLINE vf value(vf z) { return z * sigmoid(z); }
  static INLINE vf slope(vf z) {
    const vf s = sigmoid(z);
    return s + z * (s * (1.f - s)) * (1.5957691216f + 0.2140644489f * (z * z));
  }
};

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
