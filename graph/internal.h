/* graph/internal.h - inside of graphs and plans, shared by graph.c, autodiff.c, planner.c, plan.c,
 * run_vk.c and run_ref.c. */
#ifndef IPT_GRAPH_INTERNAL_H
#define IPT_GRAPH_INTERNAL_H
#include "graph/op.h"

typedef struct ipt_value {
    ipt_shape shape;
    const char *name;  /* of a leaf or output, else NULL */
    uint32_t node;     /* producer + 1; 0 = leaf */
    uint8_t out_index; /* which output of it */
    ipt_role role;     /* of a leaf */
    bool is_output;
} ipt_value;

typedef struct ipt_range {
    uint32_t first, end; /* nodes [first, end) */
} ipt_range;

struct ipt_graph {
    ipt_ctx *ctx;
    ipt_arena arena;
    ipt_status status;
    ipt_value *value; /* value[0] unused */
    uint32_t n_value, cap_value;
    ipt_node *node;
    uint32_t n_node, cap_node;
    uint32_t *cut; /* node index at which a new segment starts */
    uint32_t n_cut, cap_cut;
    ipt_range *recompute;
    uint32_t n_recompute, cap_recompute;
    ipt_range *early;
    uint32_t n_early, cap_early;
    bool in_recompute, in_early;
    const char *prefix;
    uint32_t *name_slot; /* open addressing: value ids by name */
    uint32_t n_name, cap_name;
    uint32_t *weight; /* value ids of the weights, in order of use */
    uint32_t n_weight, cap_weight;
    ipt_adapter_site *site; /* sorted by name */
    size_t n_site;
    int gate_rows, gate_batch, gate_slots;
    const char *gates; /* name of the input; NULL: "gates" */
    bool is_placed;
};

/* Grows an array of the graph so that one more item fits; false when out of memory (poisoned). */
bool ipt_graph_grow(ipt_graph *g, void **items, uint32_t *cap, uint32_t n, size_t size);

/* --- plan ------------------------------------------------------------------------------------- */
typedef struct ipt_slot {
    uint64_t bytes, off;  /* place in the arena */
    uint32_t first, last; /* lifetime in node positions, inclusive */
    bool pinned;          /* whole life of the plan */
    bool is_state;        /* not of the arena: it lies at off of the buffer, or on the host */
    ipt_buffer *buf;
    double *host;
} ipt_slot;

typedef struct ipt_planned_node {
    ipt_node n;
    ipt_launch launch;                      /* dispatches, device plans only */
    uint32_t scratch_slot[IPT_MAX_SCRATCH]; /* slot + 1 */
    ipt_weight_view weight[IPT_MAX_IN];     /* buf NULL until it is settled where they lie */
    uint32_t read[IPT_MAX_IN];              /* of the plan's ipt_reads, + 1; 0: not a weight */
    uint32_t segment;
} ipt_planned_node;

struct ipt_plan {
    ipt_ctx *ctx;
    ipt_arena arena; /* host memory of the plan */
    struct ipt_gpu *gpu;
    ipt_weights *weights;
    ipt_plan_opts opts;
    ipt_value *value;
    uint32_t n_value;
    uint32_t *place; /* value id -> slot + 1 */
    ipt_shape
        *panel; /* value id -> logical shape of a PARAM kept as packed panels; rank 0: row-major */
    ipt_planned_node *node;
    uint32_t n_node, n_segment;
    uint32_t n_early; /* the first nodes, of ipt_early */
    ipt_slot *slot;
    uint32_t n_slot, cap_slot;
    uint64_t arena_bytes, arena_part; /* its offsets are cut at multiples of arena_part: buffers */
    struct ipt_reads *reads;          /* stream.c: weights of a device plan */
    struct ipt_device_run *dev;       /* run_vk.c */
    struct ipt_host_run *host;        /* run_ref.c */
};

/* planner.c: drops dead nodes, sets segments, lifetimes (slots without offsets), in-place reuse. */
IPT_CHECKED ipt_status ipt_planner_lifetimes(ipt_plan *p, const ipt_graph *g);
uint32_t ipt_planner_add_slot(ipt_plan *p, uint64_t bytes, uint32_t first, uint32_t last,
                              bool pinned);
/* Offsets by greedy best fit over lifetimes; pad: guard bytes before and after each slot.  No slot
 * lies across a multiple of arena_part, unless it is larger. */
IPT_CHECKED ipt_status ipt_planner_offsets(ipt_plan *p, uint64_t pad);

/* --- stream.c: the weights that a device plan reads, on the device or on their way ------------ */
/* Weights that come into the ring for some nodes. */
typedef struct ipt_block {
    uint32_t first, end; /* of the list in stream.c */
    uint32_t after;      /* number + 1 of the last block before it whose place they take; 0: none */
} ipt_block;
/* Operand k of a node, which is a weight.  Where the device has no limit it is uploaded. */
IPT_CHECKED ipt_status ipt_reads_bind(ipt_plan *p, ipt_planned_node *pn, int k, ipt_use use);
/* Once all nodes are described and placed.  Errors: IPT_ERR_DEVICE_MEM says what is needed. */
IPT_CHECKED ipt_status ipt_reads_fit(ipt_plan *p);
IPT_CHECKED ipt_status ipt_reads_upload(ipt_plan *p); /* all that is not on the device */
IPT_CHECKED ipt_status ipt_reads_ring(ipt_plan *p);   /* takes its memory */
/* As many as there is room for onto the device; those that cost most for what they compute first.
 */
IPT_CHECKED ipt_status ipt_reads_settle(ipt_plan *p);
uint64_t ipt_reads_bytes(const ipt_plan *p, uint32_t node); /* that it takes of the ring */
/* Bytes of a block at most, so that the next one comes in beside it; a single node may have more.
 */
uint64_t ipt_reads_block(const ipt_plan *p);
/* Says where the weights of nodes [first, end) lie; what is not on the device makes block i. */
IPT_CHECKED ipt_status ipt_reads_place(ipt_plan *p, uint32_t i, uint32_t first, uint32_t end,
                                       ipt_block *out);
IPT_CHECKED ipt_status ipt_reads_fill(ipt_plan *p, const ipt_block *b);
void ipt_reads_destroy(ipt_plan *p);

/* run_vk.c / run_ref.c */
IPT_CHECKED ipt_status ipt_device_create(ipt_plan *p);
IPT_CHECKED ipt_status ipt_device_settle(ipt_plan *p);
void ipt_device_destroy(ipt_plan *p);
IPT_CHECKED ipt_status ipt_device_write(ipt_plan *p, uint32_t v, const void *src);
IPT_CHECKED ipt_status ipt_device_read(ipt_plan *p, uint32_t v, void *dst);
/* Where a slot begins. */
ipt_binding ipt_device_place(const ipt_plan *p, const ipt_slot *s);
IPT_CHECKED ipt_status ipt_device_exec(ipt_plan *p, uint32_t segment);
IPT_CHECKED ipt_status ipt_host_create(ipt_plan *p);
void ipt_host_destroy(ipt_plan *p);
IPT_CHECKED ipt_status ipt_host_write(ipt_plan *p, uint32_t v, const void *src);
IPT_CHECKED ipt_status ipt_host_read(ipt_plan *p, uint32_t v, void *dst);
IPT_CHECKED ipt_status ipt_host_exec(ipt_plan *p, uint32_t segment);
/* Tests: the doubles of a leaf or output of a host plan, to read and to disturb; NULL if none. */
double *ipt_host_values(ipt_plan *p, const char *name, size_t *n);
/* Values of value v as doubles, from the host run or (device plans) read back; n = element count.
 */
IPT_CHECKED ipt_status ipt_device_read_double(ipt_plan *p, uint32_t v, double *dst);
#endif
