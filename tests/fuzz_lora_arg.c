/* libFuzzer target: the value of --lora, the block weights inside, and its word in a prompt.
 *   fuzz_lora_arg -max_total_time=60 tests/data/lora_arg_fuzz */
#include "cli/cli.h"
#include "compose/compose.h"
#include "compose/concepts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            abort();                                                                               \
    } while (0)

static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c + 'a' - 'A') : c; }

/* Whatever is asked for stands in its text so often at least. */
static ipt_status find(void *user, uint16_t text, const char *word, int32_t nth, ipt_places *out)
{
    const ipt_texts *t = user;
    const char *in = t->text[text];
    size_t n = strlen(in), m = strlen(word);
    int32_t found = 0;
    REQUIRE(text < t->n && m > 0 && nth >= 0);
    for (size_t i = 0; i + m <= n; i++) {
        size_t k = 0;
        while (k < m && lower(in[i + k]) == lower(word[k]))
            k++;
        found += k == m;
    }
    REQUIRE(found > nth);
    out->n = 1;
    return IPT_OK;
}

/* The word, and another one, in the argument itself as a prompt. */
static void use_word(ipt_ctx *ctx, const char *word, const char *arg)
{
    enum { MOST = 4096 };
    ipt_arena arena;
    ipt_concepts c;
    uint16_t k = 0;
    int32_t step = 0;
    ipt_arena_init(&arena, ctx);
    ipt_texts texts = {.arena = &arena};
    const ipt_slot_use slot[] = {{.word = word, .file = "a"}, {.word = "cat", .file = "b"}};
    const ipt_part part = {1, &k};
    ipt_job job = {.ctx = ctx,
                   .n_step = 1,
                   .n_eval = 1,
                   .step_of = &step,
                   .slot = slot,
                   .texts = &texts,
                   .part = &part,
                   .n_part = 1,
                   .find = find,
                   .find_user = &texts};
    for (job.n_slot = 1; job.n_slot <= 2 && strlen(arg) < MOST; job.n_slot++) {
        REQUIRE(ipt_texts_add(&texts, arg, &k) == IPT_OK);
        if (ipt_concepts_read(&job, "m", &c) != IPT_OK) {
            REQUIRE(ipt_last_error(ctx)[0] != 0);
            continue;
        }
        REQUIRE(c.n == job.n_slot && c.of[0].word[0]);
        REQUIRE(ipt_concepts_bind(&job, "m", &c) == IPT_OK);
        REQUIRE(strcmp(texts.text[c.wording[0].text[0]], arg) == 0);
    }
    ipt_arena_finish(&arena);
}

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
        if (l.word)
            use_word(ctx, l.word, arg);
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
