/* cli/cmd_devices.c - impasto devices: what this machine can compute on. */
#include "cli/cli.h"
#include "vk/vk.h"

#include <jansson.h>

static const char *type_name(ipt_gpu_type t)
{
    switch (t) {
    case IPT_GPU_DISCRETE:
        return "discrete";
    case IPT_GPU_INTEGRATED:
        return "integrated";
    case IPT_GPU_VIRTUAL:
        return "virtual";
    case IPT_GPU_CPU:
        return "cpu";
    case IPT_GPU_OTHER:
        break;
    }
    return "other";
}

static json_t *device_json(const ipt_gpu_info *d, size_t i)
{
    const ipt_traits *t = &d->traits;
    json_t *o = json_pack(
        "{s:I, s:s, s:s, s:s, s:s, s:I, s:I, s:f, s:b, s:s, s:b, s:b, s:I, s:I, s:I}", "index",
        (json_int_t)i, "name", d->name, "type", type_name(d->type), "driver", d->driver, "api",
        d->api, "vendor_id", (json_int_t)d->vendor_id, "device_id", (json_int_t)d->device_id,
        "memory_mib", (double)d->heap_bytes / 1048576.0, "usable", d->usable, "kernels",
        t->simd ? "simd" : "tile", "f16_storage", t->f16_storage, "cooperative_matrix",
        t->coop_m > 0, "subgroup", (json_int_t)t->subgroup, "max_binding_bytes",
        (json_int_t)t->max_range, "shared_bytes", (json_int_t)t->shared_bytes);
    if (o)
        json_object_set_new(o, "budget_mib",
                            d->budget_bytes ? json_real((double)d->budget_bytes / 1048576.0)
                                            : json_null());
    if (o)
        json_object_set_new(o, "why_not", d->usable ? json_null() : json_string(d->why_not));
    return o;
}

static void print_device(const ipt_gpu_info *d, size_t i)
{
    char memory[32];
    ipt_name(memory, sizeof memory, "%.1f GiB", (double)d->heap_bytes / 1073741824.0);
    cli_line(stdout, "%-3zu %-40.40s %-10s %-28.28s %-9.9s %10s %-7s %-4s %s", i, d->name,
             type_name(d->type), d->driver, d->api, memory, d->traits.simd ? "simd" : "tile",
             d->traits.f16_storage ? "yes" : "no", d->usable ? "yes" : d->why_not);
}

static int run(cli *c, const cli_command *cmd, int argc, char **argv)
{
    ipt_gpu_info *list = NULL;
    size_t n = 0;
    int rc = cli_parse(c, cmd, argc, argv, NULL, NULL);
    if (rc != CLI_GO_ON)
        return rc;
    ipt_status s = ipt_gpu_list(c->ctx, &list, &n);
    if (s != IPT_OK)
        return cli_fail_status(c, s);
    if (c->json) {
        json_t *a = json_array();
        for (size_t i = 0; i < n; i++)
            json_array_append_new(a, device_json(&list[i], i));
        rc = cli_print_json(c, json_pack("{s:o}", "devices", a));
    } else {
        cli_line(stdout, "%-3s %-40s %-10s %-28s %-9s %10s %-7s %-4s %s", "#", "name", "type",
                 "driver", "api", "memory", "kernels", "f16", "usable");
        for (size_t i = 0; i < n; i++)
            print_device(&list[i], i);
        rc = CLI_OK;
    }
    ipt_free(list);
    return rc;
}

static const cli_option options[] = {{0}};

const cli_command cli_cmd_devices = {
    .name = "devices",
    .brief = "list the Vulkan devices that pictures can be made on",
    .usage = "[--json]",
    .about = "The first usable one is taken unless generate is given --device with an index, a "
             "part of the\n"
             "name, or \"cpu\".  Column kernels: \"simd\" for CPU devices, \"tile\" for GPUs.\n",
    .option = options,
    .example = "  impasto devices\n"
               "  impasto devices --json\n"
               "  impasto generate --device 0 -p \"a red apple\" -o apple.png\n",
    .run = run,
};
