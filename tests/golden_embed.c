/* tests/golden_embed.c - see golden_embed.h. */
#include "tests/golden_embed.h"

#include "sampler/sampler.h"

void golden_time_embedding(double t, int32_t dim, bool flip, double shift, float *out)
{
    ipt_timestep_embedding(t, dim, flip, shift, out);
}
