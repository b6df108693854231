/* compose/concepts.h - adapters bound to words of the prompt: where their words stand, and the
 * prompt as each of them is to read it.
 *
 * A slot's word is WORD[#K][=PHRASE].  WORD stands in the prompt; K is which of several (1 is the
 * first; of the adapters with that word and no K the k-th takes the k-th); PHRASE takes its place
 * in the adapter's own variant of the prompt, so that a trigger stands only where its adapter acts.
 */
#ifndef IPT_COMPOSE_CONCEPTS_H
#define IPT_COMPOSE_CONCEPTS_H
#include "compose/policy.h"

typedef struct ipt_concept {
    int32_t slot;
    const char *word, *phrase; /* phrase NULL: the word stays */
    int32_t nth;               /* from 0 */
    bool is_numbered;          /* by #K */
} ipt_concept;

/* One of the job's texts, and what becomes of it.  World 0 is the text as it is, world j that of
 * concept j - 1. */
typedef struct ipt_wording {
    uint16_t base;
    uint16_t text[IPT_MAX_SLOT + 1]; /* of each world, of the job's texts */
    int32_t *nth;      /* [worlds][n] which occurrence the concept's words are there */
    ipt_places *place; /* [worlds][n] tokens of concept c in world j's text */
} ipt_wording;

typedef struct ipt_concepts {
    int32_t n;
    ipt_concept of[IPT_MAX_SLOT];
    ipt_wording *wording; /* [n_wording]; prompt editing makes several */
    size_t n_wording, cap;
} ipt_concepts;

/* Reads the slots' words, finds them in every text that the job's evaluations have, and adds the
 * variants to the job's texts.  Memory: the arena of the texts.
 * Errors, in one sentence that names word and prompt: IPT_ERR_ARG; IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_concepts_read(const ipt_job *job, const char *method, ipt_concepts *out);
/* Finds the words' tokens; from `bind` of the method.  Errors: as above. */
IPT_CHECKED ipt_status ipt_concepts_bind(const ipt_job *job, const char *method, ipt_concepts *c);
/* The wording of an evaluation. */
const ipt_wording *ipt_concepts_at(const ipt_concepts *c, const ipt_job *job, int32_t eval);
/* The tokens of concept `c` in world j. */
const ipt_places *ipt_concepts_place(const ipt_concepts *all, const ipt_wording *v, int32_t world,
                                     int32_t c);
#endif
