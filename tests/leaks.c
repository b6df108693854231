/* tests/leaks.c - part of impasto and of every test program where they are built with
 * AddressSanitizer: leaks of ours are reported, those of drivers and layers are not.
 *
 * Libraries stay loaded, so that the stack of an allocation keeps the names of its libraries: the
 * Vulkan loader unloads drivers before the leak checker looks. */
int dlclose(void *handle);
const char *__lsan_default_suppressions(void);

__attribute__((visibility("default"))) int dlclose(void *handle)
{
    (void)handle;
    return 0;
}

__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void)
{
    return "leak:libvulkan.so\nleak:libvulkan_lvp.so\nleak:libvulkan_\nleak:libLLVM\n"
           "leak:libVkLayer_\nleak:libnvidia\nleak:libGLX_nvidia\n";
}
