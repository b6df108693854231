// shaders/gemm_emu.comp - gemm_coop.glsl with matrices in plain arithmetic, for the tests of
// devices without matrix units (traits.coop_emulated).
#version 450
//! variant f16 -DACT_F16 -DEMULATED
//! variant part -DACT_F16 -DPARTS -DEMULATED
#extension GL_GOOGLE_include_directive : require
#include "gemm_coop.glsl"
