/* bench/bench_lora.h - adapter files with random factors for measurements. */
#ifndef IPT_BENCH_BENCH_LORA_H
#define IPT_BENCH_BENCH_LORA_H
#include "bench/bench.h"
#include "engine/modules.h"

typedef struct bench_lora_file {
    ipt_adapter_file *file;
    uint8_t *bytes; /* of the file */
} bench_lora_file;
/* One adapter of the options' kind and rank on every linear module inside the transformers.
 * Ownership: caller, bench_lora_close.  Errors: IPT_ERR_NOMEM, those of ipt_adapter_open. */
IPT_CHECKED ipt_status bench_lora_open(bench *b, const ipt_module_list *modules, int32_t seed,
                                       bench_lora_file *out);
void bench_lora_close(bench_lora_file *f);
#endif
