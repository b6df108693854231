/* tests/golden_embed.c - sinusoids of time steps for the model tests. */
#include "sampler/sampler.h"

#include "tests/golden_embed.h"

void golden_time_embedding(double t, int32_t dim, bool flip, double shift, float *out)
{
    ipt_timestep_embedding(t, dim, flip, shift, out);
}
