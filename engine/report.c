/* engine/report.c - what a request says while it runs and when it is done. */
#include "engine/run.h"

void ipt_run_progress(ipt_run *u, const char *stage, int32_t done, int32_t total, int32_t image)
{
    if (!u->r->progress)
        return;
    ipt_progress p = {.stage = stage,
                      .done = done,
                      .total = total,
                      .image = image,
                      .n_image = u->set.count,
                      .eta_ms = -1,
                      .step_ms = u->step_ms};
    if (u->step_ms > 0) {
        int32_t left = u->n_eval * u->set.count - u->done_eval;
        double vae = u->vae_ms; /* before the first: as much slower as it is more work */
        if (vae <= 0 && u->step_macs > 0)
            vae = u->step_ms / u->step_macs * ipt_decode_macs(u->e, u->set.h, u->set.w);
        p.eta_ms = left * u->step_ms + (u->set.count - image) * vae;
    }
    u->r->progress(u->r->user, &p);
}

ipt_status ipt_run_report(ipt_run *u)
{
    ipt_engine *e = u->e;
    ipt_report *rep = u->rep;
    static const char *const arch[] = {"unknown", "sd1", "sd2", "sdxl"};
    rep->model = ipt_model_path(e->m->model);
    rep->model_arch = arch[e->m->config.arch];
    rep->sampler = ipt_sampler_name(u->set.kind);
    rep->schedule = ipt_schedule_name(u->set.schedule);
    rep->schedule_label = ipt_schedule_label(u->set.schedule, &u->set.config);
    rep->rng = u->set.philox ? "philox" : "torch-cpu";
    rep->compose = ipt_policy_method(u->policy)->name;
    rep->device = ipt_engine_device_name(e);
    const bool is_half = e->m->act_type == IPT_F16;
    rep->precision = e->m->weight_type == IPT_F32 ? "f32"
                     : e->m->weight_type == IPT_Q8
                         ? is_half ? "q8 weights, f16 activations" : "q8 weights, f32 activations"
                     : is_half ? "f16"
                               : "f16 weights, f32 activations";
    rep->width = u->set.width;
    rep->height = u->set.height;
    rep->steps = u->set.steps;
    rep->mask_blur = u->paste.original ? (double)ipt_paste_sigma(&u->set) : 0;
    rep->seed = u->r->seed;
    rep->n_adapter = ipt_engine_n_file(e);
    ipt_adapter_report *a =
        ipt_arena_alloc(&e->report_arena, (ipt_engine_n_file(e) + 1) * sizeof *a);
    if (!a)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < ipt_engine_n_file(e); i++) {
        const ipt_adapter_file *f = e->set->file[i];
        a[i] = (ipt_adapter_report){.file = f->path,
                                    .name = f->name,
                                    .family = ipt_adapter_family_name(f->family),
                                    .algo = f->has_conv ? "locon" : "lora",
                                    .rank_min = f->rank_min,
                                    .rank_max = f->rank_max,
                                    .modules = f->n_module,
                                    .matched = f->n_module,
                                    .n_unmatched = f->n_unmatched,
                                    .unmatched = f->unmatched};
    }
    rep->adapter = u->adapter = a;
    return IPT_OK;
}
