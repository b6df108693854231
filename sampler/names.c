/* sampler/names.c - what samplers and schedules are called: here, in A1111, ComfyUI,
 * stable-diffusion.cpp and diffusers.  Names are compared without case, blanks and punctuation, '+'
 * as 'p', so that "DPM++ 2M" and "dpmpp_2m" are one row. */
#include "sampler/internal.h"

#include <string.h>

enum { UNKNOWN = -1, MAX_NAME = 64 };

/* --- what each is called in A1111's texts, and what it is
 * ------------------------------------------ */
typedef struct label {
    const char *a1111; /* its own name where A1111 (or its fork Forge) has none */
    const char *note;  /* for those who should not meet it by chance, else NULL */
} label;

/* In the order of ipt_sampler_kind. */
static const label labels[IPT_SAMPLER_COUNT] = {
    {"DDIM", NULL},
    {"Euler", NULL},
    {"Euler a", NULL},
    {"Heun", NULL},
    {"DPM2", NULL},
    {"DPM2 a", NULL},
    {"LMS", NULL},
    {"DPM++ 2M", NULL},
    {"DPM++ 2M SDE", NULL},
    {"DPM++ SDE", NULL},
    {"DPM++ 3M SDE", NULL},
    {"DPM++ 2S", NULL},
    {"UniPC", NULL},
    {"PLMS", NULL},
    {"DEIS", NULL},
    {"LCM", "for LCM models and LoRAs: 4 steps, guidance 1 to 2"},
    {"TCD", "for TCD models and LoRAs: 4 steps, guidance 1 to 2"},
    {"DDPM", NULL},
    {"DDIM Inverse", "the way from a picture to its noise, for experiments: it makes no picture"},
    {"IPNDM", NULL},
    {"EDM Euler", "for models trained with EDM's noise levels, which Stable Diffusion's are not"},
    {"SA Solver", NULL},
};

static const char *const schedule_labels[IPT_SCHEDULE_COUNT] = {
    NULL,     "Normal", "Karras",           "Exponential", "SGM Uniform",
    "Simple", "Beta",   "Align Your Steps", "Trailing",
};

const char *ipt_sampler_label(ipt_sampler_kind kind)
{
    return (unsigned)kind < IPT_SAMPLER_COUNT ? labels[kind].a1111 : "?";
}

const char *ipt_sampler_note(ipt_sampler_kind kind)
{
    return (unsigned)kind < IPT_SAMPLER_COUNT ? labels[kind].note : NULL;
}

const char *ipt_schedule_label(ipt_schedule schedule, const ipt_sampler_config *c)
{
    if (schedule == IPT_SCHEDULE_DEFAULT && c)
        schedule = c->use_karras_sigmas        ? IPT_SCHEDULE_KARRAS
                   : c->use_exponential_sigmas ? IPT_SCHEDULE_EXPONENTIAL
                   : c->use_beta_sigmas        ? IPT_SCHEDULE_BETA
                                               : IPT_SCHEDULE_DEFAULT;
    return (unsigned)schedule < IPT_SCHEDULE_COUNT ? schedule_labels[schedule] : NULL;
}

/* --- other programs' names
 * ------------------------------------------------------------------------- */
typedef struct alias {
    const char *name; /* as plain() leaves it */
    int kind;         /* UNKNOWN: known there, not here */
} alias;

static const alias samplers[] = {
    {"eulerancestral", IPT_SAMPLER_EULER_A}, /* ComfyUI */
    {"dpm2", IPT_SAMPLER_DPM_2},
    {"kdpm2", IPT_SAMPLER_DPM_2},
    {"dpm2ancestral", IPT_SAMPLER_DPM_2_A},
    {"kdpm2ancestral", IPT_SAMPLER_DPM_2_A},
    {"kdpm2a", IPT_SAMPLER_DPM_2_A},
    {"dpmsolvermultistep", IPT_SAMPLER_DPMPP_2M}, /* diffusers' classes without their endings */
    {"dpmsolverpp", IPT_SAMPLER_DPMPP_2M},
    {"dpmsolversde", IPT_SAMPLER_DPMPP_SDE},
    {"dpmsolversinglestep", IPT_SAMPLER_DPM_SINGLE},
    {"dpmpp2s", IPT_SAMPLER_DPM_SINGLE},
    {"dpmpp2msdegpu", IPT_SAMPLER_DPMPP_2M_SDE},
    {"dpmppsdegpu", IPT_SAMPLER_DPMPP_SDE},
    {"dpmpp3msdegpu", IPT_SAMPLER_DPMPP_3M_SDE},
    {"unipcbh2", IPT_SAMPLER_UNIPC},
    {"unipcmultistep", IPT_SAMPLER_UNIPC},
    {"plms", IPT_SAMPLER_PNDM},
    {"deismultistep", IPT_SAMPLER_DEIS},
    {"sasolver", IPT_SAMPLER_SA},
    {"dpmpp2sa", UNKNOWN}, /* those of other programs that are not built here */
    {"dpmpp2sancestral", UNKNOWN},
    {"dpmpp2msdeheun", UNKNOWN},
    {"dpmpp2msdeheungpu", UNKNOWN},
    {"dpmpp2mv2", UNKNOWN},
    {"dpmfast", UNKNOWN},
    {"dpmad", UNKNOWN},
    {"dpmadaptive", UNKNOWN},
    {"restart", UNKNOWN},
    {"heunpp2", UNKNOWN},
    {"eulercfgpp", UNKNOWN},
    {"eulerancestralcfgpp", UNKNOWN},
    {"ddimcfgpp", UNKNOWN},
    {"dpmpp2mcfgpp", UNKNOWN},
    {"dpmpp2sancestralcfgpp", UNKNOWN},
    {"ipndmv", UNKNOWN},
    {"resmultistep", UNKNOWN},
    {"resmultistepancestral", UNKNOWN},
    {"res2s", UNKNOWN},
    {"gradientestimation", UNKNOWN},
    {"ersde", UNKNOWN},
    {"seeds2", UNKNOWN},
    {"seeds3", UNKNOWN},
};

static const alias schedules[] = {
    {"automatic", IPT_SCHEDULE_DEFAULT},
    {"auto", IPT_SCHEDULE_DEFAULT},
    {"uniform", IPT_SCHEDULE_NORMAL},  /* A1111: even timesteps from T-1 to 0 */
    {"discrete", IPT_SCHEDULE_NORMAL}, /* stable-diffusion.cpp: the same */
    {"linspace", IPT_SCHEDULE_NORMAL},
    {"ka", IPT_SCHEDULE_KARRAS}, /* the endings of A1111's short names */
    {"exp", IPT_SCHEDULE_EXPONENTIAL},
    {"sgm", IPT_SCHEDULE_SGM_UNIFORM},
    {"alignyoursteps", IPT_SCHEDULE_AYS},
    {"polyexponential", UNKNOWN},
    {"kloptimal", UNKNOWN},
    {"karrasexponential", UNKNOWN},
    {"ddimuniform", UNKNOWN},
    {"linearquadratic", UNKNOWN},
    {"bongtangent", UNKNOWN},
    {"smoothstep", UNKNOWN},
    {"gits", UNKNOWN},
};

/* Letters and digits in lower case, '+' as 'p', the rest left out, the first n_name bytes of name;
 * false when it does not fit. */
static bool plain(const char *name, size_t n_name, char *buf, size_t n)
{
    size_t at = 0;
    for (size_t i = 0; i < n_name; i++) {
        char c = name[i];
        c = c == '+' ? 'p' : c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
        bool keep = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (c & 0x80);
        if (keep && at + 1 >= n)
            return false;
        if (keep)
            buf[at++] = c;
    }
    buf[at] = 0;
    return at > 0;
}

/* Looks a plain name up among the names of this program (name_of) and the aliases. */
static bool look_up(const char *word, size_t n, const char *(*name_of)(int), int count,
                    const alias *others, size_t n_others, int *out)
{
    char own[MAX_NAME];
    for (int i = 0; i < count; i++) {
        const char *name = name_of(i);
        if (name && plain(name, strlen(name), own, sizeof own) && strlen(own) == n &&
            memcmp(own, word, n) == 0) {
            *out = i;
            return true;
        }
    }
    for (size_t i = 0; i < n_others; i++)
        if (strlen(others[i].name) == n && memcmp(others[i].name, word, n) == 0) {
            *out = others[i].kind;
            return true;
        }
    return false;
}

static const char *sampler_name(int i) { return ipt_sampler_name((ipt_sampler_kind)i); }
static const char *sampler_class_name(int i)
{
    return sampler_class_of((ipt_sampler_kind)i)->class_name;
}
static const char *sampler_label(int i) { return labels[i].a1111; }
static const char *schedule_name(int i) { return ipt_schedule_name((ipt_schedule)i); }

static bool find_sampler(const char *word, size_t n, int *out)
{
    static const char *const before[] = {"k", "sample"}; /* k_euler, sample_euler */
    const char *(*const kinds[])(int) = {sampler_name, sampler_label, sampler_class_name};
    for (size_t i = 0; i < IPT_COUNT(kinds); i++)
        if (look_up(word, n, kinds[i], IPT_SAMPLER_COUNT, samplers, IPT_COUNT(samplers), out))
            return true;
    for (size_t i = 0; i < IPT_COUNT(before); i++) {
        size_t k = strlen(before[i]);
        if (n > k && memcmp(word, before[i], k) == 0 &&
            look_up(word + k, n - k, sampler_name, IPT_SAMPLER_COUNT, samplers, IPT_COUNT(samplers),
                    out))
            return true;
    }
    return false;
}

static bool find_schedule(const char *word, size_t n, int *out)
{
    return look_up(word, n, schedule_name, IPT_SCHEDULE_COUNT, schedules, IPT_COUNT(schedules),
                   out);
}

ipt_name_is ipt_sampler_read(const char *name, ipt_sampler_kind *kind, ipt_schedule *schedule)
{
    char word[MAX_NAME];
    int found = 0, then = 0;
    if (!name || !plain(name, strlen(name), word, sizeof word))
        return IPT_NAME_UNKNOWN;
    size_t n = strlen(word);
    if (find_sampler(word, n, &found)) {
        if (found == UNKNOWN)
            return IPT_NAME_ELSEWHERE;
        *kind = (ipt_sampler_kind)found;
        return IPT_NAME_KNOWN;
    }
    for (size_t k = n - 1; k > 0; k--) { /* "DPM++ 2M Karras": the schedule is the rest */
        if (!find_sampler(word, k, &found) || !find_schedule(word + k, n - k, &then))
            continue;
        if (found == UNKNOWN || then == UNKNOWN)
            return IPT_NAME_ELSEWHERE;
        *kind = (ipt_sampler_kind)found;
        *schedule = (ipt_schedule)then;
        return IPT_NAME_KNOWN;
    }
    return IPT_NAME_UNKNOWN;
}

ipt_name_is ipt_schedule_read(const char *name, ipt_schedule *schedule)
{
    char word[MAX_NAME];
    int found = 0;
    if (!name || !plain(name, strlen(name), word, sizeof word) ||
        !find_schedule(word, strlen(word), &found))
        return IPT_NAME_UNKNOWN;
    if (found == UNKNOWN)
        return IPT_NAME_ELSEWHERE;
    *schedule = (ipt_schedule)found;
    return IPT_NAME_KNOWN;
}

const char *ipt_plain_name(const char *name, char *buf, size_t n)
{
    if (!plain(name, strlen(name), buf, n))
        buf[0] = 0;
    return buf;
}
