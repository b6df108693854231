// shaders/activation.glsl - activations and their slopes, f32.
#ifndef IPT_ACTIVATION_GLSL
#define IPT_ACTIVATION_GLSL
#define K_SILU 0
#define K_GELU 1
#define K_QUICK_GELU 2
#define K_RELU 3
#define K_TANH 4
#define K_AFFINE 5

// erfc, fractional error < 1.2e-7 everywhere (Chebyshev fit, Press et al., Numerical Recipes 6.2).
vec4 erfc4(vec4 x)
{
    vec4 z = abs(x), t = 1.0 / (1.0 + 0.5 * z);
    vec4 p = -0.82215223 + t * 0.17087277;
    p = 1.48851587 + t * p;
    p = -1.13520398 + t * p;
    p = 0.27886807 + t * p;
    p = -0.18628806 + t * p;
    p = 0.09678418 + t * p;
    p = 0.37409196 + t * p;
    p = 1.00002368 + t * p;
    vec4 r = t * exp(-z * z - 1.26551223 + t * p);
    return mix(r, 2.0 - r, lessThan(x, vec4(0.0)));
}
// Phi(x) = erfc(-x / sqrt 2) / 2
vec4 phi4(vec4 x) { return 0.5 * erfc4(-x * 0.70710678118); }
vec4 gelu4(vec4 x) { return x * phi4(x); }
vec4 gelu_slope4(vec4 x) { return phi4(x) + x * 0.39894228040 * exp(-0.5 * x * x); }
vec4 sigmoid4(vec4 x) { return 1.0 / (1.0 + exp(-x)); }
vec4 tanh4(vec4 x) { return 2.0 * sigmoid4(2.0 * x) - 1.0; }
#endif
