/* model_io/keymap.h - the form of the rule tables; for keymap.c and keymap_sd.c. */
#ifndef IPT_MODEL_IO_KEYMAP_H
#define IPT_MODEL_IO_KEYMAP_H
#include "model_io/internal.h"

typedef struct ipt_leaf_rule {
    const char *canonical, *foreign;
} ipt_leaf_rule;
typedef struct ipt_key_rule {
    const char *pattern, *form; /* NULL pattern ends the table */
    const ipt_leaf_rule *leaf;  /* renames what follows; NULL: kept */
    bool whole;                 /* the pattern is the whole name */
    uint8_t third;
    bool transposed;
} ipt_key_rule;
/* Several rules may match one name: first the usual spelling, then others. */
const ipt_key_rule *ipt_key_rules(ipt_layout layout);
#endif
