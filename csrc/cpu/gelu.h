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

// The same for results that are rounded to 8 or fewer bits: no division. 0.5 + z P(z^2), a minimax fit on |z| < 4.5 whose
// gelu is off by 6e-5 at most (a bf16 near 1 is by 4e-3), and constant past it.
struct ErfCoarse {
  static INLINE vf value(vf z) {
    const vf inside = min(max(z, splat(-4.5f)), splat(4.5f)), u = inside * inside;
    vf p = u * 3.000319437340693e-11f - 3.284178484719291e-09f;
    p = p * u + 1.580350925678431e-07f;
    p = p * u - 4.431861270859372e-06f;
    p = p * u + 8.121163409668952e-05f;
    p = p * u - 0.0010362655157223344f;
    p = p * u + 0.009580696001648903f;
    p = p * u - 0.06597734242677689f;
    p = p * u + 0.39870861172676086f;
    return z * (inside * p + 0.5f);
  }
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
