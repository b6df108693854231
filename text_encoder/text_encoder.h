/* text_encoder/text_encoder.h - CLIP text models as one graph function: CLIP-L, OpenCLIP-H,
 * OpenCLIP-bigG. Must not know: files, Vulkan, prompts (tokenizer.h has those). */
#ifndef IPT_TEXT_ENCODER_TEXT_ENCODER_H
#define IPT_TEXT_ENCODER_TEXT_ENCODER_H
#include "core/model_config.h"
#include "graph/graph.h"

typedef struct ipt_text_key {
    int32_t batch, tokens;
    int32_t skip;    /* 0: output of the last layer; k: of the k-th layer before it */
    bool final_norm; /* final layer norm on "text" (SD 1.x, 2.x); false: hidden state as it is
                        (SDXL) */
    bool pooled;     /* also output "pooled" */
    bool injected;   /* textual inversion: inputs "keep" and "extra" replace token vectors */
    ipt_dtype act;
} ipt_text_key;

/* Inputs: "ids" [N,T] i32; with pooled "eos" [N] i32 (position of the end token);
 * with injected "keep" [N,T,1] f32 (1: the token's vector, 0: not) and "extra" [N,T,width] f32
 * (added). Outputs: "text" [N,T,width] f32; "pooled" [N,projection_dim] f32 (after final norm and
 * projection; [N,width] without projection). Weight names: transformers'
 * ("text_model.encoder.layers.0...", "text_projection.weight"). Source: Radford et al. 2021;
 * transformers CLIPTextModel, CLIPTextModelWithProjection. */
void ipt_text_build(ipt_graph *g, const ipt_text_config *c, const ipt_text_key *key);

/* Position of the token whose output is pooled: the first `eos` when the configuration names it,
 * the largest id when eos is 2 (the rule of old configurations).  Source: transformers
 * CLIPTextTransformer. */
int32_t ipt_text_eos(const ipt_text_config *c, const int32_t *ids, int32_t n);
#endif
