/* shaders/registry.h - every compiled shader by name ("gemm.f16"); the table is generated. */
#ifndef IPT_SHADERS_REGISTRY_H
#define IPT_SHADERS_REGISTRY_H
#include <stddef.h>
#include <stdint.h>

typedef struct ipt_shader {
    const char *name; /* file, or file.variant; NULL ends the table */
    const uint32_t *spirv;
    size_t bytes;
} ipt_shader;
extern const ipt_shader ipt_shaders[];
#endif
