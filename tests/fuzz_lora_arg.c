/* libFuzzer target: the value of --lora, and the block weights inside.
 *   fuzz_lora_arg -max_total_time=60 tests/data/lora_arg_fuzz */
#include "cli/cli.h"
#include "compose/compose.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    ipt_lora l = {0};
    char *buf = NULL, *arg = malloc(size + 1); /* of its own length: a read behind it is seen */
    float row[IPT_GATE_ROWS];
    ipt_curve curve;
    if (!arg || ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK) {
        free(arg);
        return 0;
    }
    memcpy(arg, data, size);
    arg[size] = 0;
    if (cli_lora_parse(ctx, arg, &l, &buf) == IPT_OK) {
        REQUIRE(l.path == buf && l.path[0] && strlen(l.path) <= size);
        REQUIRE(fabsf(l.weight) <= 100 && fabsf(l.te_weight) <= 100);
        REQUIRE(l.start >= 0 && l.start < l.end && l.end <= 1);
        REQUIRE(!l.word || (l.word[0] && l.word + strlen(l.word) <= buf + size));
        if (ipt_block_weights(ctx, l.blocks, row) == IPT_OK)
            for (int i = 0; i < IPT_GATE_ROWS; i++)
                REQUIRE(fabsf(row[i]) <= 100);
        REQUIRE(!l.curve || (l.curve[0] && l.curve + strlen(l.curve) <= buf + 2 * size + 2));
        if (l.curve && ipt_curve_parse(ctx, l.curve, &curve) == IPT_OK)
            for (int i = 0; i <= 16; i++)
                REQUIRE(fabsf(ipt_curve_at(&curve, (float)i / 16)) <= 100.001F);
    } else {
        REQUIRE(buf == NULL && ipt_last_error(ctx)[0] != '\0');
    }
    ipt_free(buf);
    free(arg);
    ipt_ctx_destroy(&ctx);
    return 0;
}
