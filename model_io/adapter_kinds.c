/* model_io/adapter_kinds.c - the kinds of adapters: key names, shapes, how each acts.
 *
 * Sources: LyCORIS (lycoris/modules: weight_list, make_module_from_state_dict),
 * kohya-ss/sd-scripts, PEFT (tuners: lora, loha, lokr, ia3), DiffuseKronA (krona.py), A1111
 * (oft_diag), ComfyUI (set_weight). */
#include "model_io/kinds.h"

#include <string.h>

/* --- shapes ----------------------------------------------------------------------------------- */
typedef struct dims {
    int n;
    int64_t d[4];
} dims;

/* The first axis and the count must be right: kernels of one tap are stored with 2 or 4 axes. */
static ipt_status expect(const ipt_adapter_file *f, const ipt_st_tensor *t, dims want)
{
    char text[96];
    size_t at = 0;
    int64_t count = 1;
    for (int i = 0; i < want.n; i++)
        count *= want.d[i];
    if (t->rank > 0 ? t->dim[0] == want.d[0] && t->count == (size_t)count : count == 1)
        return IPT_OK;
    for (int i = 0; i < want.n && at < sizeof text; i++) {
        int len = snprintf(text + at, sizeof text - at, "%s%" PRId64 "%s", i ? "," : "[", want.d[i],
                           i + 1 == want.n ? "]" : "");
        at += len > 0 ? (size_t)len : 0;
    }
    return ipt_adapter_bad_shape(f, t, text);
}

/* [a, in] or [a, in, kh, kw]. */
static dims with_taps(int64_t a, int64_t in, const ipt_module *m)
{
    return m->kh * m->kw == 1 ? (dims){2, {a, in, 0, 0}} : (dims){4, {a, in, m->kh, m->kw}};
}

static int64_t first_dim(const ipt_st_tensor *t) { return t->rank > 0 ? t->dim[0] : 0; }

static ipt_status check_rank(const ipt_adapter_file *f, const ipt_st_tensor *t, int64_t rank)
{
    return rank >= 1 && rank <= IPT_MAX_FILE_RANK
               ? IPT_OK
               : ipt_adapter_bad_shape(f, t, "a rank of 1 to 65536");
}

/* Both or none of two keys; *there says which. */
static ipt_status pair(const ipt_adapter_file *f, const ipt_adapter_module *a, int i, int k,
                       bool *there)
{
    const ipt_st_tensor *x = a->part[i], *y = a->part[k];
    *there = x && y;
    if (!x == !y)
        return IPT_OK;
    const char *key = (x ? x : y)->name;
    int stem = (int)(strlen(key) - strlen(a->kind->key[x ? i : k]));
    return ipt_fail(f->impl->ctx, IPT_ERR_FORMAT, "%s: key '%s' is there, but not '%.*s%s'",
                    f->path, key, stem, key, a->kind->key[x ? k : i]);
}

static ipt_status need(const ipt_adapter_file *f, const ipt_adapter_module *a, int have, int want)
{
    bool there = false;
    return a->part[want] ? IPT_OK : pair(f, a, have, want, &there);
}

/* --- LoRA, LoCon ------------------------------------------------------------------------------ */
enum { DOWN, UP, MID };

static ipt_status read_lora(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    bool there = false;
    IPT_TRY(pair(f, a, DOWN, UP, &there));
    if (!there) /* the middle alone */
        IPT_TRY(need(f, a, MID, DOWN));
    const ipt_st_tensor *down = a->part[DOWN], *mid = a->part[MID], *of = mid ? mid : down;
    int64_t rank = first_dim(of), inner = first_dim(down);
    if (rank < 1 || rank > IPT_MAX_FILE_RANK)
        return ipt_adapter_bad_shape(f, of, "a rank of 1 to 65536 in front");
    IPT_TRY(expect(f, a->part[UP], (dims){2, {m->out, rank, 0, 0}}));
    if (mid) {
        if (inner > IPT_MAX_FILE_RANK || mid->rank != 4)
            return ipt_adapter_bad_shape(f, mid, "four axes");
        IPT_TRY(expect(f, mid, (dims){4, {rank, inner, m->kh, m->kw}}));
        IPT_TRY(expect(f, down, (dims){4, {inner, m->in, 1, 1}}));
        f->has_tucker = true;
    } else {
        IPT_TRY(expect(f, down, with_taps(rank, m->in, m)));
    }
    a->act = IPT_ACTS_LOW_RANK;
    a->rank = a->n_col = (int32_t)rank;
    return IPT_OK;
}

/* --- DiffuseKronA ----------------------------------------------------------------------------- */
/* down is A^T [a2,a1], up is B [b1,b2]; no LoRA has such shapes unless the module has one input. */
static bool fits_krona(const ipt_module *m, const ipt_st_tensor *const part[])
{
    const ipt_st_tensor *down = part[DOWN], *up = part[UP];
    if (!down || !up || down->rank != 2 || up->rank != 2 || m->kh * m->kw != 1)
        return false;
    for (int i = 0; i < 2; i++)
        if (down->dim[i] < 1 || down->dim[i] > m->in + (int64_t)m->out || up->dim[i] < 1 ||
            up->dim[i] > m->in + (int64_t)m->out)
            return false;
    if (down->dim[1] == m->in && up->dim[0] == m->out && down->dim[0] == up->dim[1])
        return false;
    return down->dim[1] * up->dim[0] == m->out && down->dim[0] * up->dim[1] == m->in;
}

static ipt_status read_krona(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    const ipt_st_tensor *down = a->part[DOWN], *up = a->part[UP];
    (void)f, (void)m;
    a->act = IPT_ACTS_KRON;
    a->kron = (ipt_adapter_kron){(int32_t)down->dim[1], (int32_t)up->dim[0], (int32_t)down->dim[0],
                                 (int32_t)up->dim[1], true};
    return IPT_OK;
}

/* --- LoHa ------------------------------------------------------------------------------------- */
enum { W1_A, W1_B, W2_A, W2_B, T1, T2 };

static ipt_status read_loha(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    bool there = false, tucker = false;
    int64_t cols = 1;
    for (int k = W1_A; k <= T2; k++)
        if (a->part[k])
            for (int i = W1_A; i <= W2_B; i++)
                IPT_TRY(need(f, a, k, i));
    IPT_TRY(pair(f, a, W1_A, W1_B, &there));
    IPT_TRY(pair(f, a, T1, T2, &tucker));
    for (int k = 0; k < 2; k++) {
        const ipt_st_tensor *wa = a->part[W1_A + 2 * k], *wb = a->part[W1_B + 2 * k],
                            *t = a->part[T1 + k];
        int64_t inner = first_dim(wb), rank = t ? first_dim(t) : inner;
        IPT_TRY(check_rank(f, wb, inner));
        IPT_TRY(check_rank(f, t ? t : wb, rank));
        if (t) {
            IPT_TRY(expect(f, t, (dims){4, {rank, inner, m->kh, m->kw}}));
            IPT_TRY(expect(f, wa, (dims){2, {rank, m->out, 0, 0}}));
            IPT_TRY(expect(f, wb, (dims){2, {inner, m->in, 0, 0}}));
        } else {
            IPT_TRY(expect(f, wa, (dims){2, {m->out, rank, 0, 0}}));
            IPT_TRY(expect(f, wb, with_taps(rank, m->in, m)));
        }
        cols *= rank;
        a->rank = k ? a->rank : (int32_t)inner;
    }
    /* (A1 B1) o (A2 B2) has rank r1 r2: as such where that is less work than the whole matrix */
    int64_t fan = (int64_t)m->in * m->kh * m->kw;
    bool few = cols < IPT_MAX_FILE_RANK / 2 && cols * (fan + m->out) < fan * m->out;
    a->act = few ? IPT_ACTS_LOW_RANK : IPT_ACTS_DENSE;
    a->n_col = few ? (int32_t)cols : 0;
    f->has_tucker = f->has_tucker || tucker;
    return IPT_OK;
}

/* --- LoKr ------------------------------------------------------------------------------------- */
enum { K1, K1_A, K1_B, K2, K2_A, K2_B, K2_T };

/* How Q is given: whole, in two or with a middle.  n: its columns, inputs and taps.  *rank: of the
 * factors. */
static ipt_status read_q(ipt_adapter_file *f, const ipt_module *m, const ipt_adapter_module *a,
                         int64_t n, int64_t *rank)
{
    const ipt_st_tensor *const *p = a->part;
    const ipt_adapter_kron *k = &a->kron;
    const bool is_flat = n == k->i2;
    int64_t inner = p[K2] ? 0 : first_dim(p[K2_B]);
    if (p[K2])
        return expect(f, p[K2], is_flat ? (dims){2, {k->o2, n, 0, 0}} : with_taps(k->o2, k->i2, m));
    IPT_TRY(check_rank(f, p[K2_B], inner));
    *rank = inner;
    if (!p[K2_T]) {
        IPT_TRY(expect(f, p[K2_A], (dims){2, {k->o2, inner, 0, 0}}));
        return expect(f, p[K2_B],
                      is_flat ? (dims){2, {inner, n, 0, 0}} : with_taps(inner, k->i2, m));
    }
    *rank = first_dim(p[K2_T]);
    IPT_TRY(check_rank(f, p[K2_T], *rank));
    IPT_TRY(expect(f, p[K2_T], (dims){4, {*rank, inner, m->kh, m->kw}}));
    IPT_TRY(expect(f, p[K2_A], (dims){2, {*rank, k->o2, 0, 0}}));
    IPT_TRY(expect(f, p[K2_B], (dims){2, {inner, k->i2, 0, 0}}));
    f->has_tucker = true;
    return IPT_OK;
}

/* P's shape says how outputs and inputs are cut.  The first LyCORIS cut inputs and taps of a kernel
 * together ([16,48] and [20,60] for 320 x 320 x 3 x 3): no product over channels, so it acts as low
 * rank r1 r2 where that is less work than the whole matrix, else as that. */
static ipt_status read_lokr(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    bool split1 = false, split2 = false;
    const ipt_st_tensor *const *p = a->part;
    IPT_TRY(pair(f, a, K1_A, K1_B, &split1));
    IPT_TRY(pair(f, a, K2_A, K2_B, &split2));
    const ipt_st_tensor *one = p[K1] ? p[K1] : p[K1_A], *two = p[K2] ? p[K2] : p[K2_A];
    if (!one || !two || (p[K2_T] && !split2)) {
        int have = one ? (p[K1] ? K1 : K1_A) : two ? (p[K2] ? K2 : K2_A) : K2_T;
        return need(f, a, have, one ? (p[K2_T] ? K2_A : K2) : K1);
    }
    const ipt_st_tensor *wide = p[K1] ? one : p[K1_B];
    int64_t o1 = first_dim(one), i1 = wide->rank > 1 ? wide->dim[1] : 0, r1 = 0, r2 = 0,
            fan = (int64_t)m->in * m->kh * m->kw;
    bool is_flat = i1 > 0 && m->in % i1 != 0 && !p[K2_T];
    if (o1 < 1 || i1 < 1 || m->out % o1 || (is_flat ? fan : m->in) % i1) {
        char text[96];
        snprintf(text, sizeof text, "divisors of [%d,%d]", (int)m->out, (int)m->in);
        return ipt_adapter_bad_shape(f, one, text);
    }
    a->kron = (ipt_adapter_kron){(int32_t)o1, (int32_t)(m->out / o1), (int32_t)i1,
                                 (int32_t)(is_flat ? fan / i1 : m->in / i1), false};
    if (p[K1]) {
        IPT_TRY(expect(f, one, (dims){2, {o1, i1, 0, 0}}));
    } else {
        r1 = first_dim(p[K1_B]);
        IPT_TRY(check_rank(f, p[K1_B], r1));
        IPT_TRY(expect(f, one, (dims){2, {o1, r1, 0, 0}}));
        IPT_TRY(expect(f, p[K1_B], (dims){2, {r1, i1, 0, 0}}));
    }
    IPT_TRY(read_q(f, m, a, fan / i1, &r2));
    a->rank = (int32_t)(r2 ? r2 : r1); /* 0: both are whole, and LyCORIS takes no scale */
    a->act = IPT_ACTS_KRON;
    if (is_flat) {
        int64_t cols = r1 * r2;
        bool few = cols > 0 && cols < IPT_MAX_FILE_RANK / 2 && cols * (fan + m->out) < fan * m->out;
        a->act = few ? IPT_ACTS_LOW_RANK : IPT_ACTS_DENSE;
        a->n_col = few ? (int32_t)cols : 0;
    }
    return IPT_OK;
}

/* --- whole differences ------------------------------------------------------------------------ */
static ipt_status read_given(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    a->act = m->is_norm ? IPT_ACTS_NORM : IPT_ACTS_DENSE;
    return expect(f, a->part[0],
                  m->is_norm ? (dims){1, {m->out, 0, 0, 0}} : with_taps(m->out, m->in, m));
}

static ipt_status read_bias(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    a->act = IPT_ACTS_BIAS;
    return expect(f, a->part[0], (dims){1, {m->out, 0, 0, 0}});
}

/* --- IA3 -------------------------------------------------------------------------------------- */
static ipt_status read_ia3(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    const ipt_st_tensor *v = a->part[0], *on_input = a->part[1];
    IPT_TRY(need(f, a, 1, 0));
    IPT_TRY(expect(f, on_input, (dims){1, {1, 0, 0, 0}}));
    IPT_TRY(ipt_st_load(on_input));
    a->is_by_input = ipt_st_get(on_input, 0) != 0.0F;
    a->act = IPT_ACTS_DENSE;
    int64_t n = a->is_by_input ? m->in : m->out;
    return v->rank > 1 && v->dim[0] == 1 ? expect(f, v, (dims){2, {1, n, 0, 0}})
                                         : expect(f, v, (dims){1, {n, 0, 0, 0}});
}

/* ia3_l is [out,1], or [1,in] for a feed-forward module; a convolution's is [1,n,1,1] either way.
 */
static ipt_status read_peft_ia3(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    const ipt_st_tensor *v = a->part[0];
    bool conv = v->rank == 4, row = v->rank > 1 && v->dim[0] == 1 && m->out > 1;
    if (conv && m->in == m->out)
        return ipt_fail(f->impl->ctx, IPT_ERR_UNSUPPORTED,
                        "%s: key '%s': IA3 of a convolution with as many inputs as outputs: the "
                        "file does not say which of them it scales",
                        f->path, v->name);
    a->is_by_input = conv ? v->count == (size_t)m->in : row;
    a->act = a->kind->is_bias ? IPT_ACTS_BIAS : IPT_ACTS_DENSE;
    int64_t n = a->is_by_input ? m->in : m->out;
    return row ? expect(f, v, (dims){2, {1, n, 0, 0}}) : expect(f, v, (dims){2, {n, 1, 0, 0}});
}

/* PEFT scales a result with its bias; without a bias, or by inputs, nothing is left to do. */
static bool fits_peft_ia3_bias(const ipt_module *m, const ipt_st_tensor *const part[])
{
    const ipt_st_tensor *v = part[0];
    bool row = v->rank > 1 && v->dim[0] == 1 && m->out > 1;
    return m->has_bias && (v->rank == 4 ? v->count != (size_t)m->in : !row);
}

/* --- OFT, BOFT -------------------------------------------------------------------------------- */
enum { BLOCKS, RESCALE, CONSTRAINT };

static ipt_status read_rescale(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    a->act = IPT_ACTS_DENSE;
    if (a->part[CONSTRAINT])
        IPT_TRY(expect(f, a->part[CONSTRAINT], (dims){1, {1, 0, 0, 0}}));
    return a->part[RESCALE] ? expect(f, a->part[RESCALE], (dims){1, {m->out, 0, 0, 0}}) : IPT_OK;
}

static ipt_status read_oft(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    const ipt_st_tensor *t = a->part[BLOCKS];
    int64_t n = t->rank == 3 ? t->dim[0] : 0, size = n > 0 ? m->out / n : 0;
    if (n < 1 || size < 1 || size * n != m->out)
        return ipt_adapter_bad_shape(f, t, "[blocks,size,size] with blocks x size = outputs");
    IPT_TRY(expect(f, t, (dims){3, {n, size, size, 0}}));
    return read_rescale(f, m, a);
}

static bool fits_boft(const ipt_module *m, const ipt_st_tensor *const part[])
{
    (void)m;
    return part[BLOCKS]->rank == 4;
}

static ipt_status read_boft(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    const ipt_st_tensor *t = a->part[BLOCKS];
    int64_t stages = t->dim[0], n = t->dim[1], size = n > 0 ? m->out / n : 0;
    bool ok = n >= 1 && size >= 2 && size % 2 == 0 && size * n == m->out && stages >= 1 &&
              stages < 31 && m->out % (((int64_t)1 << (stages - 1)) * size) == 0;
    if (!ok)
        return ipt_adapter_bad_shape(
            f, t, "[stages,blocks,size,size] with even size, blocks x size = outputs");
    IPT_TRY(expect(f, t, (dims){4, {stages, n, size, size}}));
    return read_rescale(f, m, a);
}

/* --- GLoRA ------------------------------------------------------------------------------------ */
enum { A1, A2, B1, B2, BM };

static ipt_status read_glora(ipt_adapter_file *f, const ipt_module *m, ipt_adapter_module *a)
{
    for (int i = A1; i <= B2; i++)
        for (int k = A1; a->part[i] && k <= B2; k++)
            IPT_TRY(need(f, a, i, k));
    if (!a->part[A1])
        return need(f, a, BM, A1);
    int64_t ra = first_dim(a->part[A2]), rb = first_dim(a->part[B2]);
    IPT_TRY(check_rank(f, a->part[A2], ra));
    IPT_TRY(check_rank(f, a->part[B2], rb));
    IPT_TRY(expect(f, a->part[A1], (dims){2, {m->in, ra, 0, 0}}));
    IPT_TRY(expect(f, a->part[A2], (dims){2, {ra, m->in, 0, 0}}));
    if (a->part[BM]) {
        int64_t r = first_dim(a->part[BM]);
        IPT_TRY(check_rank(f, a->part[BM], r));
        IPT_TRY(expect(f, a->part[BM], (dims){4, {r, rb, m->kh, m->kw}}));
        IPT_TRY(expect(f, a->part[B2], (dims){2, {rb, m->in, 0, 0}}));
        rb = r;
    } else {
        IPT_TRY(expect(f, a->part[B2], with_taps(rb, m->in, m)));
    }
    IPT_TRY(expect(f, a->part[B1], (dims){2, {m->out, rb, 0, 0}}));
    bool one_tap = m->kh * m->kw == 1;
    a->act = one_tap ? IPT_ACTS_LOW_RANK : IPT_ACTS_DENSE;
    a->n_col = one_tap ? (int32_t)(ra + rb) : 0;
    a->rank = (int32_t)ra;
    return IPT_OK;
}

/* --- the table -------------------------------------------------------------------------------- */
#define LORA(family_, down, up, mid)                                                               \
    .name = "lora", .family = family_, .key = {down, up, mid}, .tells = 7, .on = IPT_ON_WEIGHT,    \
    .is_product = true, .is_scaled = true, .read = read_lora, .factors = ipt_lora_factors,         \
    .delta = ipt_low_rank_delta
#define GIVEN(name_, key_, on_)                                                                    \
    .name = name_, .family = IPT_ADAPTER_LYCORIS, .key = {key_}, .tells = 1, .on = on_,            \
    .is_product = true, .delta = ipt_given_delta

const ipt_kind ipt_kinds[] = {
    {LORA(IPT_ADAPTER_KOHYA, ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight")},
    {LORA(IPT_ADAPTER_PEFT, ".lora_A.weight", ".lora_B.weight", NULL)},
    {LORA(IPT_ADAPTER_PEFT, ".lora_A.default.weight", ".lora_B.default.weight", NULL)},
    {LORA(IPT_ADAPTER_PEFT, ".lora_A.default_0.weight", ".lora_B.default_0.weight", NULL)},
    {LORA(IPT_ADAPTER_DIFFUSERS, ".lora.down.weight", ".lora.up.weight", NULL)},
    {LORA(IPT_ADAPTER_DIFFUSERS, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight",
          NULL)},
    {.name = "krona",
     .family = IPT_ADAPTER_KRONA,
     .key = {".down.weight", ".up.weight"},
     .tells = 3,
     .on = IPT_ON_WEIGHT,
     .attn_procs = true,
     .is_product = true,
     .fits = fits_krona,
     .read = read_krona,
     .delta = ipt_kron_delta},
    {LORA(IPT_ADAPTER_ATTN_PROCS, ".down.weight", ".up.weight", NULL), .attn_procs = true},
    {.name = "loha",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"},
     .tells = 63,
     .on = IPT_ON_WEIGHT,
     .is_product = true,
     .is_scaled = true,
     .read = read_loha,
     .factors = ipt_loha_factors,
     .delta = ipt_loha_delta},
    {.name = "lokr",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b",
             ".lokr_t2", IPT_KRONA_DOWN, IPT_KRONA_UP},
     .tells = 127,
     .on = IPT_ON_WEIGHT,
     .is_product = true,
     .is_scaled = true,
     .read = read_lokr,
     .factors = ipt_lokr_factors,
     .delta = ipt_kron_delta},
    {.name = "glora",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".bm.weight"},
     .tells = 31,
     .on = IPT_ON_WEIGHT,
     .is_scaled = true,
     .is_relative = true,
     .read = read_glora,
     .factors = ipt_glora_factors,
     .delta = ipt_glora_delta},
    {.name = "boft",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".oft_blocks", ".rescale", ".alpha"},
     .tells = 1,
     .on = IPT_ON_WEIGHT,
     .is_relative = true,
     .fits = fits_boft,
     .read = read_boft,
     .delta = ipt_boft_delta},
    {.name = "oft",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".oft_blocks", ".rescale", ".alpha"},
     .tells = 1,
     .on = IPT_ON_WEIGHT,
     .is_relative = true,
     .read = read_oft,
     .delta = ipt_oft_delta},
    {.name = "oft_diag", /* of old LyCORIS: the blocks are the rotation itself */
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".oft_diag", ".rescale", ".alpha"},
     .tells = 1,
     .on = IPT_ON_WEIGHT,
     .is_relative = true,
     .read = read_oft,
     .delta = ipt_oft_delta},
    {.name = "ia3",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".weight", ".on_input"},
     .tells = 2,
     .on = IPT_ON_WEIGHT,
     .is_relative = true,
     .read = read_ia3,
     .delta = ipt_ia3_delta},
    {.name = "ia3",
     .family = IPT_ADAPTER_PEFT,
     .key = {".ia3_l"},
     .tells = 1,
     .on = IPT_ON_WEIGHT,
     .is_relative = true,
     .read = read_peft_ia3,
     .delta = ipt_peft_ia3_delta},
    {.name = "ia3",
     .family = IPT_ADAPTER_PEFT,
     .key = {".ia3_l"},
     .tells = 1,
     .on = IPT_ON_WEIGHT,
     .is_bias = true,
     .is_relative = true,
     .fits = fits_peft_ia3_bias,
     .read = read_peft_ia3,
     .delta = ipt_peft_ia3_delta},
    {GIVEN("diff", ".diff", IPT_ON_WEIGHT | IPT_ON_NORM), .read = read_given},
    {GIVEN("diff", ".diff_b", IPT_ON_WEIGHT | IPT_ON_NORM), .is_bias = true, .read = read_bias},
    {GIVEN("norm", ".w_norm", IPT_ON_NORM), .read = read_given},
    {GIVEN("norm", ".b_norm", IPT_ON_NORM), .is_bias = true, .read = read_bias},
    {.name = "set_weight",
     .family = IPT_ADAPTER_LYCORIS,
     .key = {".set_weight"},
     .tells = 1,
     .on = IPT_ON_WEIGHT | IPT_ON_NORM,
     .is_relative = true,
     .read = read_given,
     .delta = ipt_set_delta},
    {.name = NULL},
};

const ipt_kind ipt_kind_cloneofsimo = {LORA(IPT_ADAPTER_CLONEOFSIMO, NULL, NULL, NULL)};

const char *ipt_adapter_kind_name(const ipt_adapter_module *m)
{
    return m->magnitude ? "dora" : m->kind->name;
}

bool ipt_adapter_needs_base(const ipt_adapter_module *m)
{
    return m->kind->is_relative || m->magnitude;
}
