// shaders/gemm_coop.comp - the product on matrix units: see gemm_coop.glsl.
#version 450
//! requires GL_KHR_cooperative_matrix
//! variant f16 -DACT_F16
//! variant part -DACT_F16 -DPARTS
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#include "gemm_coop.glsl"
