// The activations of the gate on a GPU (the formulas stand in glu.h), for the kernels that apply it.
#pragma once

#include "device_code.h"
#include "glu.h"

namespace cramfast {

struct Gelu {
  static DEVICE float cdf(float a) { return 0.5f * erfcf(-0.707106781f * a); }  // no cancellation in the left tail
  static DEVICE float value(float a) { return a * cdf(a); }
  static DEVICE float derivative(float a) { return cdf(a) + a * (0.398942280f * expf(-0.5f * a * a)); }
};

struct Silu {
  static DEVICE float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }
  static DEVICE float value(float a) { return a * sigmoid(a); }
  static DEVICE float derivative(float a) {
    const float s = sigmoid(a);
    return s * (1.0f + a * (1.0f - s));
  }
};

// f(Gelu or Silu): instantiates a generic lambda for an activation.
template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::gelu) {
    f(Gelu{});
  } else {
    f(Silu{});
  }
}

}  // namespace cramfast
