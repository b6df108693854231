/* eval/judge.c - a judge's file, its graph, and what its outputs mean for the views of a picture.
 */
#include "eval/judge.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#include "graph/graph.h"
#include "model_io/model_io.h"

enum {
    CELLS = 8, /* an edge of the map of features */
    N_CELL = CELLS * CELLS,
    WINDOW = IPT_VIEW_WINDOW * CELLS / IPT_VIEW_SIDE, /* an edge of a small window, in cells */
    GROUPS = 8,
    MAX_NAMES = 256,
    MAX_FEATURES = 1024,
};

struct ipt_judge {
    ipt_ctx *ctx;
    ipt_arena arena;
    ipt_safetensors *file;
    ipt_weights *store;
    ipt_plan *plan;
    json_t *error;
    ipt_judge_info info;
    size_t n_feature,
        n_out;        /* of a cell; n_out = 2 (n_class + 2) + n_style: small, whole, styles */
    float *centre;    /* [2][n_feature] small windows, the whole */
    float *reference; /* [2][n_class][n_feature] less the centre, of length 1 */
    float *pixels;    /* [64][64][3] -1..1 */
    float *features;  /* [N_CELL][n_feature] */
    float *cells;     /* [N_CELL][n_out] */
};

/* --- the file --------------------------------------------------------------------------------- */
/* A list of names in the metadata, as JSON. */
static ipt_status read_names(ipt_judge *j, const char *key, const char *const **out, size_t *n)
{
    const char *path = ipt_safetensors_path(j->file), *text = ipt_safetensors_meta(j->file, key);
    json_t *list = NULL, *item = NULL;
    size_t i = 0;
    if (!text)
        return ipt_fail(j->ctx, IPT_ERR_FORMAT, "%s: not a judge: no '%s' in its metadata", path,
                        key);
    IPT_TRY(ipt_json_parse(j->ctx, path, text, strlen(text), &list));
    ipt_status status = IPT_OK;
    const char **names = ipt_arena_alloc(&j->arena, (json_array_size(list) + 1) * sizeof *names);
    if (!names)
        status = IPT_ERR_NOMEM;
    else if (json_array_size(list) == 0 || json_array_size(list) > MAX_NAMES)
        status = ipt_fail(j->ctx, IPT_ERR_FORMAT, "%s: '%s' has %zu names, expected 1 to %d", path,
                          key, json_array_size(list), MAX_NAMES);
    json_array_foreach(list, i, item)
    {
        if (status != IPT_OK)
            break;
        names[i] =
            json_is_string(item) ? ipt_arena_strdup(&j->arena, json_string_value(item)) : NULL;
        if (!names[i])
            status = ipt_fail(j->ctx, IPT_ERR_FORMAT, "%s: '%s' is not a list of names", path, key);
    }
    *out = (const char *const *)names;
    *n = json_array_size(list);
    json_decref(list);
    return status;
}

/* A tensor of exactly n numbers, finite ones. */
static ipt_status read_numbers(ipt_judge *j, const char *name, size_t n, float **out)
{
    const char *path = ipt_safetensors_path(j->file);
    const ipt_st_tensor *t = ipt_safetensors_find(j->file, name);
    if (!t)
        return ipt_fail(j->ctx, IPT_ERR_MISSING, "%s: not a judge: no '%s'", path, name);
    if (t->count != n)
        return ipt_fail(j->ctx, IPT_ERR_SHAPE, "%s: '%s' has %zu numbers, expected %zu", path, name,
                        t->count, n);
    IPT_TRY(ipt_st_load(t));
    if (!ipt_st_finite(t, NULL))
        return ipt_fail(j->ctx, IPT_ERR_FORMAT, "%s: '%s' is not finite", path, name);
    *out = ipt_arena_alloc(&j->arena, n * sizeof **out);
    if (!*out)
        return IPT_ERR_NOMEM;
    ipt_st_to_f32(t, 0, n, *out);
    return IPT_OK;
}

static ipt_status read_file(ipt_judge *j)
{
    const char *error = ipt_safetensors_meta(j->file, "own_error"),
               *path = ipt_safetensors_path(j->file);
    float *threshold = NULL;
    IPT_TRY(read_names(j, "classes", &j->info.class_name, &j->info.n_class));
    IPT_TRY(read_names(j, "styles", &j->info.style_name, &j->info.n_style));
    const ipt_st_tensor *head = ipt_safetensors_find(j->file, "head.weight");
    j->n_out = 2 * (j->info.n_class + 2) + j->info.n_style;
    if (!head || head->rank != 2 || head->dim[0] != (int64_t)j->n_out || head->dim[1] < 1 ||
        head->dim[1] > MAX_FEATURES)
        return ipt_fail(j->ctx, IPT_ERR_SHAPE, "%s: not a judge: 'head.weight' is not [%zu,1..%d]",
                        path, j->n_out, MAX_FEATURES);
    j->n_feature = (size_t)head->dim[1];
    IPT_TRY(read_numbers(j, "threshold", j->info.n_class, &threshold));
    IPT_TRY(read_numbers(j, "identity.centre", 2 * j->n_feature, &j->centre));
    IPT_TRY(
        read_numbers(j, "identity.reference", 2 * j->info.n_class * j->n_feature, &j->reference));
    if (error)
        IPT_TRY(ipt_json_parse(j->ctx, path, error, strlen(error), &j->error));
    j->info.path = path;
    j->info.threshold = threshold;
    j->info.error = j->error;
    return IPT_OK;
}

/* --- the graph: tools/eval_compose/judge.py --------------------------------------------------- */
static ipt_val conv(ipt_graph *g, ipt_val x, const char *site, int out, int stride)
{
    return ipt_conv2d(g, x, site, out,
                      (ipt_conv){.kernel = 3, .stride = stride, .pad_lo = 1, .pad_hi = 1});
}

static ipt_val block(ipt_graph *g, ipt_val x, const char *name, int width)
{
    char norm1[32], conv1[32], norm2[32], conv2[32];
    ipt_val h =
        ipt_group_norm(g, x, ipt_name(norm1, sizeof norm1, "%s.norm1", name), GROUPS, 1e-5F, true);
    h = conv(g, h, ipt_name(conv1, sizeof conv1, "%s.conv1", name), width, 1);
    h = ipt_group_norm(g, h, ipt_name(norm2, sizeof norm2, "%s.norm2", name), GROUPS, 1e-5F, true);
    return ipt_conv2d_add(g, h, ipt_name(conv2, sizeof conv2, "%s.conv2", name), width,
                          (ipt_conv){.kernel = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1},
                          (ipt_val){0}, x);
}

/* Channels that a convolution of the file gives; 0: it is not there. */
static int width_of(const ipt_judge *j, const char *site)
{
    char name[64];
    const ipt_st_tensor *t =
        ipt_safetensors_find(j->file, ipt_name(name, sizeof name, "%s.weight", site));
    return t && t->rank == 4 && t->dim[0] > 0 && t->dim[0] <= MAX_FEATURES ? (int)t->dim[0] : 0;
}

static ipt_status record(ipt_judge *j, struct ipt_gpu *gpu)
{
    const int a = width_of(j, "stem"), b = width_of(j, "down1"), c = (int)j->n_feature;
    if (a == 0 || b == 0 || a % GROUPS || b % GROUPS || c % GROUPS)
        return ipt_fail(j->ctx, IPT_ERR_SHAPE,
                        "%s: not a judge: widths %d, %d, %d, expected multiples of %d",
                        ipt_safetensors_path(j->file), a, b, c, GROUPS);
    ipt_graph *g = NULL;
    IPT_TRY(ipt_weights_file(j->ctx, j->file, gpu, IPT_F32, NULL, &j->store));
    IPT_TRY(ipt_graph_create(j->ctx, &g));
    ipt_val x =
        ipt_leaf(g, IPT_INPUT, "x", ipt_shape4(IPT_F32, 1, IPT_VIEW_SIDE, IPT_VIEW_SIDE, 3));
    x = block(g, conv(g, x, "stem", a, 2), "block0", a);
    x = block(g, conv(g, x, "down1", b, 2), "block1", b);
    x = block(g, block(g, conv(g, x, "down2", c, 2), "block2", c), "block3", c);
    x = ipt_group_norm(g, x, "norm", GROUPS, 1e-5F, true);
    ipt_output(g, "features", x);
    ipt_output(g, "cells", ipt_linear(g, x, "head", (int)j->n_out, true));
    ipt_status status =
        ipt_plan_create(g, &(ipt_plan_opts){.gpu = gpu, .weights = j->store}, &j->plan);
    ipt_graph_destroy(&g);
    return status;
}

static ipt_status buffers(ipt_judge *j)
{
    j->pixels = ipt_arena_alloc(&j->arena, sizeof *j->pixels * IPT_VIEW_SIDE * IPT_VIEW_SIDE * 3);
    j->features = ipt_arena_alloc(&j->arena, sizeof *j->features * N_CELL * j->n_feature);
    j->cells = ipt_arena_alloc(&j->arena, sizeof *j->cells * N_CELL * j->n_out);
    return j->pixels && j->features && j->cells ? IPT_OK : IPT_ERR_NOMEM;
}

ipt_status ipt_judge_open(ipt_ctx *ctx, struct ipt_gpu *gpu, const char *path, ipt_judge **out)
{
    ipt_judge *j = ipt_alloc(ctx, sizeof *j);
    if (!j)
        return IPT_ERR_NOMEM;
    j->ctx = ctx;
    ipt_arena_init(&j->arena, ctx);
    ipt_status status = ipt_safetensors_open(ctx, path, &j->file);
    if (status == IPT_OK)
        status = read_file(j);
    if (status == IPT_OK)
        status = buffers(j);
    if (status == IPT_OK)
        status = record(j, gpu);
    if (status != IPT_OK) {
        ipt_judge_close(&j);
        return status;
    }
    *out = j;
    return IPT_OK;
}

void ipt_judge_close(ipt_judge **jp)
{
    ipt_judge *j = jp ? *jp : NULL;
    if (!j)
        return;
    ipt_plan_destroy(&j->plan);
    ipt_weights_destroy(&j->store);
    ipt_safetensors_close(&j->file);
    json_decref(j->error);
    ipt_arena_finish(&j->arena);
    ipt_free(j);
    *jp = NULL;
}

const ipt_judge_info *ipt_judge_get_info(const ipt_judge *j) { return &j->info; }

static int find_name(const char *const *name, size_t n, const char *which)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(name[i], which) == 0)
            return (int)i;
    return -1;
}

int ipt_judge_class(const ipt_judge *j, const char *name)
{
    return find_name(j->info.class_name, j->info.n_class, name);
}

int ipt_judge_style(const ipt_judge *j, const char *name)
{
    return find_name(j->info.style_name, j->info.n_style, name);
}

/* --- looking ---------------------------------------------------------------------------------- */
static void softmax(const double *x, size_t n, float *p)
{
    double top = x[0], sum = 0;
    for (size_t i = 1; i < n; i++)
        top = x[i] > top ? x[i] : top;
    for (size_t i = 0; i < n; i++)
        sum += exp(x[i] - top);
    for (size_t i = 0; i < n; i++)
        p[i] = (float)(exp(x[i] - top) / sum);
}

/* Mean over a view's cells of columns first .. first + n - 1 of a map [N_CELL][stride]. */
static void view_mean(const float *map, size_t stride, size_t first, size_t n, int view,
                      double *mean)
{
    const bool whole = view == IPT_VIEW_WHOLE;
    const size_t y0 = whole ? 0 : (size_t)(view / IPT_VIEW_ROW),
                 x0 = whole ? 0 : (size_t)(view % IPT_VIEW_ROW), edge = whole ? CELLS : WINDOW;
    for (size_t i = 0; i < n; i++)
        mean[i] = 0;
    for (size_t y = y0; y < y0 + edge; y++)
        for (size_t x = x0; x < x0 + edge; x++)
            for (size_t i = 0; i < n; i++)
                mean[i] += (double)map[(y * CELLS + x) * stride + first + i];
    for (size_t i = 0; i < n; i++)
        mean[i] /= (double)(edge * edge);
}

/* Cosines of a view's features, less the mean of all pictures, to the references. */
static void likeness(const ipt_judge *j, int view, double *f, float *like)
{
    const size_t n = j->n_feature, which = view == IPT_VIEW_WHOLE;
    const float *centre = j->centre + which * n, *ref = j->reference + which * j->info.n_class * n;
    double length = 0;
    view_mean(j->features, n, 0, n, view, f);
    for (size_t i = 0; i < n; i++) {
        f[i] -= (double)centre[i];
        length += f[i] * f[i];
    }
    length = sqrt(length);
    for (size_t c = 0; c < j->info.n_class; c++) {
        double dot = 0;
        for (size_t i = 0; i < n; i++)
            dot += f[i] * (double)ref[c * n + i];
        like[c] = length > 0 ? (float)(dot / length) : 0.0F;
    }
}

static void interpret(const ipt_judge *j, double *scratch, ipt_sight *s)
{
    const size_t n = s->n_class + 2;
    for (int v = 0; v < IPT_VIEWS; v++) {
        view_mean(j->cells, j->n_out, v == IPT_VIEW_WHOLE ? n : 0, n, v, scratch);
        softmax(scratch, n, s->p + (size_t)v * n);
        likeness(j, v, scratch, s->like + (size_t)v * s->n_class);
    }
    view_mean(j->cells, j->n_out, 2 * n, s->n_style, IPT_VIEW_WHOLE, scratch);
    softmax(scratch, s->n_style, s->style);
}

/* Means of n x n pixels, n = 1: the pixels themselves. */
static void shrink(const ipt_judge *j, const ipt_image *im)
{
    const size_t n = (size_t)im->w / IPT_VIEW_SIDE;
    for (size_t i = 0; i < IPT_VIEW_SIDE * IPT_VIEW_SIDE * 3; i++) {
        const size_t y = i / 3 / IPT_VIEW_SIDE * n, x = i / 3 % IPT_VIEW_SIDE * n;
        unsigned sum = 0;
        for (size_t r = 0; r < n; r++)
            for (size_t c = 0; c < n; c++)
                sum += im->rgb[((y + r) * (size_t)im->w + x + c) * 3 + i % 3];
        j->pixels[i] = (float)sum / (float)(n * n) / 127.5F - 1.0F;
    }
}

static ipt_status look_at(ipt_judge *j, const ipt_image *im, ipt_sight *out)
{
    double scratch[MAX_FEATURES];
    shrink(j, im);
    IPT_TRY(ipt_plan_write(j->plan, "x", j->pixels,
                           sizeof *j->pixels * IPT_VIEW_SIDE * IPT_VIEW_SIDE * 3));
    IPT_TRY(ipt_plan_run(j->plan, 0));
    IPT_TRY(ipt_plan_read(j->plan, "features", j->features,
                          sizeof *j->features * N_CELL * j->n_feature));
    IPT_TRY(ipt_plan_read(j->plan, "cells", j->cells, sizeof *j->cells * N_CELL * j->n_out));
    ipt_sight s = {.n_class = j->info.n_class, .n_style = j->info.n_style};
    s.p = ipt_calloc(j->ctx, IPT_VIEWS * (s.n_class + 2), sizeof *s.p);
    s.like = ipt_calloc(j->ctx, IPT_VIEWS * s.n_class, sizeof *s.like);
    s.style = ipt_calloc(j->ctx, s.n_style, sizeof *s.style);
    if (!s.p || !s.like || !s.style) {
        ipt_sight_finish(&s);
        return IPT_ERR_NOMEM;
    }
    interpret(j, scratch, &s);
    *out = s;
    return IPT_OK;
}

ipt_status ipt_judge_look(ipt_judge *j, const ipt_image *im, ipt_sight *out)
{
    if (im->w == im->h && im->w > 0 && im->w % IPT_VIEW_SIDE == 0)
        return look_at(j, im, out);
    const size_t n = (size_t)im->w * (size_t)im->h * 3;
    ipt_image copy = {im->w, im->h, ipt_alloc(j->ctx, n)};
    if (!copy.rgb)
        return IPT_ERR_NOMEM;
    memcpy(copy.rgb, im->rgb, n);
    ipt_status status = ipt_image_resize(j->ctx, &copy, IPT_VIEW_SIDE, IPT_VIEW_SIDE);
    if (status == IPT_OK)
        status = look_at(j, &copy, out);
    ipt_image_finish(&copy);
    return status;
}

void ipt_sight_finish(ipt_sight *s)
{
    ipt_free(s->p);
    ipt_free(s->like);
    ipt_free(s->style);
    memset(s, 0, sizeof *s);
}

const float *ipt_judge_cells(const ipt_judge *j, size_t *n_cell)
{
    *n_cell = j->n_out;
    return j->cells;
}

const float *ipt_judge_features(const ipt_judge *j, size_t *n_feature)
{
    *n_feature = j->n_feature;
    return j->features;
}
