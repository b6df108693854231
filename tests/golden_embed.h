/* tests/golden_embed.h - sinusoids of time steps and sizes, apart from golden.h because the headers of
 * samplers and of model configurations need not be known to the same file. */
#ifndef IPT_TESTS_GOLDEN_EMBED_H
#define IPT_TESTS_GOLDEN_EMBED_H
#include <stdbool.h>
#include <stdint.h>

/* As ipt_timestep_embedding of sampler.h: out [dim]. */
void golden_time_embedding(double t, int32_t dim, bool flip, double shift, float *out);
#endif
