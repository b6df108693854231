/* tests/clora_job.h - a job of CLoRA without a device: prompts, slots bound to words, and a finder
 * that cuts texts as CLIP's tokenizer does. */
#ifndef IPT_TESTS_CLORA_JOB_H
#define IPT_TESTS_CLORA_JOB_H
#include "tests/support.h"

#include "compose/compose.h"

enum { MOST_EVALS = 128, SIDE = 4, CHANNELS = 2, VALUES = CHANNELS * SIDE * SIDE, TOKENS = 64 };
enum { MOST_ROWS = 2 * (IPT_MAX_SLOT + 1), GRID = 2, CELLS = GRID * GRID, MOST_CELLS = 16 };

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_arena arena;
    ipt_texts texts;
    ipt_job job;
    ipt_slot_use slot[IPT_MAX_SLOT];
    ipt_part part[2];
    int32_t step_of[MOST_EVALS];
    uint16_t text[MOST_EVALS], negative[MOST_EVALS];
    const char *opt[4];
    ipt_rows rows;
    ipt_result res[MOST_ROWS];
    float maps[MOST_ROWS][MOST_CELLS * TOKENS], d_maps[MOST_ROWS][MOST_CELLS * TOKENS];
    float eps[MOST_ROWS][VALUES];
    uint64_t seed;
    char said[256];
} fixture;

/* Of each cmocka test; *state is a fixture. */
int clora_set_up(void **state);
int clora_tear_down(void **state);
#define CLORA_CASE(name) cmocka_unit_test_setup_teardown(name, clora_set_up, clora_tear_down)

/* n_step steps of `each` evaluations, from step `first` on. */
void set_steps(fixture *f, int32_t n_step, int32_t each, int32_t first);
/* Slots with the words of a list "cat;dog;-", '-' being a style. */
void give_words(fixture *f, const char *list);
/* The text of all evaluations, and a negative one. */
void give_prompt(fixture *f, const char *text);
float uniform(uint64_t *seed);                                         /* 0..1 */
void near_to(double got, double want, double limit, const char *what); /* relative, and absolute */
#endif
