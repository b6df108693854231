/* tests/golden_adapters.h - adapter files over one model, stacked by the bank as the engine does
 * it. */
#ifndef IPT_TESTS_GOLDEN_ADAPTERS_H
#define IPT_TESTS_GOLDEN_ADAPTERS_H
#include "compose/compose.h"
#include "engine/modules.h"
#include "tests/golden.h"
#include "text_encoder/text_encoder.h"

enum { GOLDEN_MAX_FILES = 4 };
typedef struct adapters {
    bench *b;
    ipt_model *m;
    ipt_module_list modules;
    ipt_adapter_file *file[GOLDEN_MAX_FILES];
    size_t n_file;
} adapters;
void adapters_open(adapters *k, bench *b, const char *model);
void adapters_close(adapters *k);
/* One more file; fails the test when a key fits nothing. */
void adapters_add(adapters *k, const char *path);
void adapters_drop(adapters *k); /* all files */
/* UNet with the files; gates [N, n_file], the same in every block.  eps is channels last. */
void adapters_unet(adapters *k, const unet_call *c, const float *gates, float *eps);
/* One text encoder with the files; gates [n_file]; pooled only when the key has it. */
void adapters_text(adapters *k, int comp, const ipt_text_key *key, const float *gates,
                   const int32_t *ids, float *text, float *pooled);
#endif
