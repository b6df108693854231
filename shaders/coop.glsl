// shaders/coop.glsl - what kernels for matrix units share: cooperative matrices, f16 x f16 -> f32,
// of the device's shape (TM, TN and TK are constants of whoever includes this), and the barrier
// between a subgroup's lanes and its matrices in shared memory.
#ifndef IPT_COOP_GLSL
#define IPT_COOP_GLSL
#extension GL_KHR_memory_scope_semantics : require
#define SUBGROUP_BARRIER()                                                                         \
    controlBarrier(gl_ScopeSubgroup, gl_ScopeSubgroup, gl_StorageSemanticsShared,                  \
                   gl_SemanticsAcquireRelease)
#ifndef EMULATED
#define matrix_a coopmat<float16_t, gl_ScopeSubgroup, TM, TK, gl_MatrixUseA>
#define matrix_b coopmat<float16_t, gl_ScopeSubgroup, TK, TN, gl_MatrixUseB>
#define matrix_c coopmat<float, gl_ScopeSubgroup, TM, TN, gl_MatrixUseAccumulator>
#endif
#endif
