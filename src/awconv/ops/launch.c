// Launches kernels of CUDA, one after another as a table lists them: one call of the driver each, and nothing between.
//
// launcher.py makes the tables, of 64-bit numbers: of addresses among the arguments, of launches, and for each launch
// its function, programs, threads of a program, bytes of shared memory and number of parameters, then a pair for each
// parameter. (-1, value) is that value; (index, offset) is that argument and an offset.
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST_PARAMETERS = 64, ALIGNMENT = 16, NOT_LAUNCHED = -1 };

typedef int launch_kernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters,
                          void **extra);
static launch_kernel *launch;
static int (*get_context)(void **context);
static int (*get_error_name)(int error, const char **name);

// Finds the driver's functions; returns 0 if one is missing.
int open_driver(const char *path) {
    void *driver = dlopen(path, RTLD_NOW);
    if (driver == NULL)
        return 0;
    launch = (launch_kernel *)dlsym(driver, "cuLaunchKernel");
    get_context = (int (*)(void **))dlsym(driver, "cuCtxGetCurrent");
    get_error_name = (int (*)(int, const char **))dlsym(driver, "cuGetErrorName");
    return launch != NULL && get_context != NULL && get_error_name != NULL;
}

// Returns 0, the driver's error, or NOT_LAUNCHED: an address is not aligned, or the thread has no context yet.
int launch_all(const int64_t *table, const uint64_t *arguments, void *stream) {
    const int64_t addresses = *table++, launches = *table++;
    uint64_t bits = 0;
    for (int64_t index = 0; index < addresses; index++)
        bits |= arguments[index];
    void *context = NULL;
    if (bits % ALIGNMENT != 0 || get_context(&context) != 0 || context == NULL)
        return NOT_LAUNCHED;
    for (int64_t index = 0; index < launches; index++) {
        void *function = (void *)(intptr_t)table[0];
        const unsigned programs = (unsigned)table[1], threads = (unsigned)table[2], shared = (unsigned)table[3];
        const int64_t count = table[4];
        table += 5;
        uint64_t values[MOST_PARAMETERS];
        void *parameters[MOST_PARAMETERS];
        for (int64_t parameter = 0; parameter < count; parameter++, table += 2) {
            values[parameter] = (table[0] < 0 ? 0 : arguments[table[0]]) + (uint64_t)table[1];
            parameters[parameter] = &values[parameter];
        }
        if (programs == 0) // which the driver refuses
            continue;
        const int error = launch(function, programs, 1, 1, threads, 1, 1, shared, stream, parameters, NULL);
        if (error != 0)
            return error;
    }
    return 0;
}

const char *error_name(int error) {
    const char *name = NULL;
    return get_error_name(error, &name) == 0 && name != NULL ? name : "unknown";
}
