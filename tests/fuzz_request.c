/* tests/fuzz_request.c - requests from outside: JSON, the chunks of a PNG, prompts that change over
 * the steps and that AND joins.  What is taken must read back as itself.
 *
 *   build-fuzz/tests/fuzz_request -max_total_time=60 tests/data/request_fuzz
 */
#include "engine/impasto.h"

#include "text_encoder/tokenizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void use_json(ipt_ctx *ctx, const char *text, size_t n)
{
    ipt_arena arena;
    ipt_request r, again;
    ipt_arena_init(&arena, ctx);
    ipt_request_init(&r);
    ipt_request_init(&again);
    if (ipt_request_parse(&arena, "fuzz", text, n, &r) == IPT_OK) {
        REQUIRE(r.steps >= 0 && r.n_lora <= 32 && !(r.cfg < 0));
        char *one = ipt_request_write(&r, &arena);
        REQUIRE(one && ipt_request_parse(&arena, "own", one, strlen(one), &again) == IPT_OK);
        char *two = ipt_request_write(&again, &arena);
        REQUIRE(two && strcmp(one, two) == 0);
    } else {
        REQUIRE(ipt_last_error(ctx)[0] != 0);
    }
    ipt_arena_finish(&arena);
}

static void use_png(ipt_ctx *ctx, const char *data, size_t n)
{
    const char *text = NULL;
    size_t n_text = 0;
    if (n >= 8 && ipt_image_find_request(ctx, "fuzz.png", data, n, &text, &n_text) == IPT_OK) {
        REQUIRE(text >= data && n_text <= n && text + n_text <= data + n);
        use_json(ctx, text, n_text);
    }
}

static void use_prompt(ipt_ctx *ctx, const char *text, size_t n, int32_t steps)
{
    ipt_prompt_edits *p = NULL;
    ipt_prompt_conjunct part[8];
    size_t parts = 0;
    char *out = malloc(n + 1); /* the sanitizer sees one byte too much */
    REQUIRE(out);
    if (ipt_prompt_edits_create(ctx, text, n, steps, &p) == IPT_OK)
        for (int32_t step = 0; step <= steps + 1; step++) {
            int32_t end = ipt_prompt_edits_end(p, step);
            REQUIRE(end >= 1 && end <= steps && (end >= step || end == steps));
            REQUIRE(ipt_prompt_edits_text(p, end, out) <= n);
        }
    ipt_prompt_edits_destroy(&p);
    free(out);
    if (ipt_prompt_split(ctx, text, n, part, 8, &parts) == IPT_OK)
        for (size_t i = 0; i < parts; i++)
            REQUIRE(part[i].text >= text && part[i].text + part[i].len <= text + n &&
                    isfinite(part[i].weight));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    if (size < 1 || ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 0;
    const char *text = (const char *)data + 1;
    if (data[0] % 4 == 0)
        use_png(ctx, text, size - 1);
    else if (data[0] % 4 == 1)
        use_json(ctx, text, size - 1);
    else
        use_prompt(ctx, text, size - 1, 1 + data[0] / 4 % 16);
    ipt_ctx_destroy(&ctx);
    return 0;
}
