/* The operator AWConv of the domain awconv for ONNX Runtime on a CPU: the forward half of the fused algorithm.
 *
 *   AWConv(input, weight, gain, bias = 0)
 *     = min(max(bias[p] + sum over c, t of  gain[n, p, b(c), t] weight[p, c, t] input[n, c, ...], minimum), maximum)
 *
 * Shapes are (N, C1, *size), (C2, C1 / group, *kernel), (N, C2, blocks, taps) and (C2); the output is (N, C2, *out_size).
 * Attributes: strides, pads (before each axis, then after each), dilations, group, minimum, maximum. One to three
 * spatial axes, float32. Batch and sizes may differ from call to call, and calls may come from several threads.
 *
 * Work is divided into more tasks than there are threads, of which each thread of ONNX Runtime's takes the next one. No
 * sum is divided, so that results do not depend on the number of threads.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../../ops/fused/cpu_correlate.h"
#include "../../ops/fused/cpu_lanes.h"
#include "runtime.h"

#define EXPORTED __attribute__((visibility("default")))
#define MOST_AXES 5
#define TRY(CALL)                                     \
    do {                                              \
        status_t *failure = (CALL);                   \
        if (failure) return failure;                  \
    } while (0)

typedef struct {
    const runtime_t *runtime;
    memory_t *memory;
    int64_t spatial, group, stride[3], dilation[3], before[3], after[3];
    real minimum, maximum;
    real *packed; /* the weights, if they are constant */
} kernel_t;

typedef struct {
    const real *data;
    int64_t axes, sizes[MOST_AXES];
} tensor_t;

/* A call: what all of its tasks know. */
typedef struct {
    const kernel_t *kernel;
    problem_t problem;
    layout_t layout;
    const real *input, *weight, *gain, *bias, *packed;
    real *output, *rows, *scratches, *all_packed;
    int64_t start, samples; /* the samples that are in the rows */
    lanes_t lanes;
    int64_t segments, slices, together, skipped, scratch;
    int64_t tasks, next; /* the next one is taken by the thread that is free first */
} call_t;

static status_t *invalid(const runtime_t *runtime, const char *text) {
    char whole[400];
    snprintf(whole, sizeof whole, "awconv's AWConv: %s", text);
    return runtime->create_status(INVALID_ARGUMENT, whole);
}

/* Weights of a group are packed panel by panel, one after the other. */
static int64_t panels_of(const problem_t *problem) { return ceil_div(problem->group_out, PANEL); }
static int64_t packed_group(const problem_t *problem) {
    return padded_channels(problem->group_out) * problem->group_in * product(problem->kernel);
}
static const real *packed_panel(const problem_t *problem, const real *packed, int64_t group, int64_t panel) {
    return packed + group * packed_group(problem) + panel * PANEL * problem->group_in * product(problem->kernel);
}
static void pack(const problem_t *problem, const real *weight, int64_t index, real *packed) {
    const int64_t group = index / panels_of(problem), panel = index % panels_of(problem);
    const int64_t weights = problem->group_out * problem->group_in * product(problem->kernel);
    pack_panel(problem, 0, weight + group * weights, panel, (real *)packed_panel(problem, packed, group, panel));
}

static void finish(const call_t *call, real *result, int64_t count, int64_t channel) {
    const real bias = call->bias ? call->bias[channel] : 0;
    const real minimum = call->kernel->minimum, maximum = call->kernel->maximum;
    if (!call->bias && minimum == -INFINITY && maximum == INFINITY) return;
    for (int64_t i = 0; i < count; i++) {
        real value = result[i] + bias;
        value = value < minimum ? minimum : value; /* NaN stays */
        result[i] = value > maximum ? maximum : value;
    }
}

static void pack_task(call_t *call, int64_t task, real *scratch) {
    (void)scratch;
    pack(&call->problem, call->weight, task, call->all_packed);
}

/* Some rows of the padded copy of a sample's group. */
static void copy_task(call_t *call, int64_t task, real *scratch) {
    (void)scratch;
    layout_t part = call->layout;
    const int64_t slice = task % call->slices, index = task / call->slices;
    const int64_t first = part.padded[1] * slice / call->slices, stop = part.padded[1] * (slice + 1) / call->slices;
    part.padded[1] = stop - first, part.before[1] -= first;
    copy_rows(&part, call->input + (call->start * call->problem.groups + index) * part.channels * product(part.size),
              call->rows + index * part.group + first * part.row);
}

/* Some rows of the output of a sample, for a panel of channels. */
static void correlate_task(call_t *call, int64_t task, real *scratch) {
    const problem_t *problem = &call->problem;
    const int64_t panels = panels_of(problem), segments = call->segments, samples = call->samples;
    const int64_t segment = task % segments, n = task / segments % samples, panel = task / segments / samples % panels;
    const int64_t group = task / segments / samples / panels, index = (call->start + n) * problem->groups + group;
    const int64_t plane = product(problem->out_size), first = panel * PANEL;
    const int64_t rows = problem->out_size[0] * problem->out_size[1];
    const int64_t begin = rows * segment / segments, count = rows * (segment + 1) / segments - begin;
    real *result = call->output + index * problem->group_out * plane;
    correlate_panel(problem, 0, &call->layout, call->rows + (n * problem->groups + group) * call->layout.group,
                    packed_panel(problem, call->packed, group, panel),
                    call->gain + index * problem->group_out * problem->blocks * product(problem->kernel), panel, segment,
                    segments, scratch, result);
    for (int64_t p = first; p < least(first + PANEL, problem->group_out); p++)
        finish(call, result + p * plane + begin * problem->out_size[2], count * problem->out_size[2],
               group * problem->group_out + p);
}

/* Some rows of the output of a sample, for a vector of channels that are convolved by themselves. */
static void lane_task(call_t *call, int64_t task, real *scratch) {
    const share_t share = share_of_lanes(&call->lanes, task);
    const int64_t width = call->problem.out_size[2], count = (share.stop - share.begin) * width;
    real *result = call->output + (share.sample * call->problem.groups + share.channel) * call->lanes.shape.plane;
    lanes_task(&call->lanes, task, scratch);
    for (int64_t lane = 0; lane < LANES; lane++)
        finish(call, result + lane * call->lanes.shape.plane + share.begin * width, count, share.channel + lane);
}

/* Some groups of few channels of a sample, as a problem of their own. */
static void lines_task(call_t *call, int64_t task, real *scratch) {
    problem_t part = call->problem;
    const int64_t n = task / call->segments, first = call->skipped + task % call->segments * call->together;
    const int64_t taps = product(part.kernel), plane = product(part.out_size), index = n * part.groups + first;
    part.batch = part.threads = 1, part.groups = least(call->together, part.groups - first);
    real *result = call->output + index * part.group_out * plane;
    correlate_lines(&part, 0, call->input + index * part.group_in * product(part.size),
                    call->weight + first * part.group_out * part.group_in * taps,
                    call->gain + index * part.group_out * part.blocks * taps, result, scratch);
    for (int64_t p = 0; p < part.groups * part.group_out; p++)
        finish(call, result + p * plane, plane, first * part.group_out + p);
}

/* What a thread of ONNX Runtime's runs: one function for each kind of task. */
#define WORKER(TASK)                                                                                             \
    static void TASK##s(void *work, size_t worker) {                                                             \
        call_t *call = work;                                                                                     \
        for (int64_t task; (task = __atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED)) < call->tasks;)         \
            TASK(call, task, call->scratches + worker * call->scratch);                                          \
    }
WORKER(pack_task)
WORKER(copy_task)
WORKER(correlate_task)
WORKER(lane_task)
WORKER(lines_task)

static status_t *run_tasks(call_t *call, context_t *context, void (*run)(void *, size_t), int64_t tasks) {
    call->tasks = tasks, call->next = 0;
    return call->kernel->runtime->in_parallel(context, run, least(call->problem.threads, tasks), 0, call);
}

static status_t *run_lanes(call_t *call, context_t *context) {
    lanes_t *plan = &call->lanes;
    plan->source = call->input, plan->weight = call->weight, plan->gain = call->gain, plan->result = call->output;
    plan->end = call->input + call->problem.batch * call->problem.groups * product(call->problem.size);
    return run_tasks(call, context, lane_tasks, call->problem.batch * plan->chunks * plan->bands);
}

/* The groups that are left. */
static status_t *run_lines(call_t *call, context_t *context) {
    call->segments = ceil_div(call->problem.groups - call->skipped, call->together);
    return run_tasks(call, context, lines_tasks, call->problem.batch * call->segments);
}

static status_t *run_panels(call_t *call, context_t *context) {
    const problem_t *problem = &call->problem;
    const int64_t at_once = rows_at_once(problem, &call->layout), panels = problem->groups * panels_of(problem);
    if (!call->kernel->packed) TRY(run_tasks(call, context, pack_tasks, panels));
    for (call->start = 0; call->start < problem->batch; call->start += at_once) {
        call->samples = least(at_once, problem->batch - call->start);
        const int64_t copies = call->samples * problem->groups, tasks = panels * call->samples;
        call->slices = least(call->layout.padded[1], ceil_div(2 * problem->threads - 1, copies));
        TRY(run_tasks(call, context, copy_tasks, copies * call->slices));
        call->segments = ceil_div(2 * problem->threads - 1, tasks);
        TRY(run_tasks(call, context, correlate_tasks, tasks * call->segments));
    }
    return NULL;
}

static status_t *run(call_t *call, context_t *context) {
    const problem_t *problem = &call->problem;
    const kernel_t *kernel = call->kernel;
    const int lanes = in_lanes(problem, 0), lines = lanes || in_lines(problem->group_out);
    call->layout = layout_of(problem, 0);
    const int64_t copies = lines ? 0 : rows_at_once(problem, &call->layout) * problem->groups * call->layout.group;
    const int64_t weights = lines || kernel->packed ? 0 : problem->groups * packed_group(problem);
    if (lines) {
        call->together = 4 * groups_at_once(&call->layout);
        call->scratch = line_scratch(problem, 0);
        if (lanes) {
            call->lanes = lanes_of(problem, 0), call->skipped = call->lanes.chunks * LANES;
            call->scratch = most(call->scratch, lane_scratch(&call->lanes));
        }
    } else
        call->scratch = scratch_elements(problem, 0);
    call->scratch = ceil_div(call->scratch, PANEL) * PANEL;
    allocator_t *allocator;
    TRY(kernel->runtime->allocator_of(context, kernel->memory, &allocator));
    real *workspace =
        allocator->allocate(allocator, (copies + LANES + weights + problem->threads * call->scratch) * sizeof(real));
    if (!workspace) return kernel->runtime->create_status(FAILED, "awconv's AWConv: no memory for its workspace");
    call->rows = workspace, call->all_packed = workspace + copies + LANES;
    call->scratches = call->all_packed + weights;
    call->packed = kernel->packed ? kernel->packed : call->all_packed;
    status_t *status = lanes ? run_lanes(call, context) : NULL;
    if (!status && !lines) status = run_panels(call, context);
    if (!status && lines) status = run_lines(call, context);
    allocator->release(allocator, workspace);
    return status;
}

static status_t *read_tensor(const runtime_t *runtime, const value_t *value, tensor_t *tensor) {
    shape_t *shape;
    size_t axes = 0;
    TRY(runtime->data_of((value_t *)value, (void **)&tensor->data));
    TRY(runtime->shape_of(value, &shape));
    status_t *status = runtime->axes_of(shape, &axes);
    if (!status && axes <= MOST_AXES) status = runtime->sizes_of(shape, tensor->sizes, axes);
    runtime->release_shape(shape);
    tensor->axes = axes;
    return status;
}

/* The part of the problem that the weights tell; why not, or null. */
static const char *read_weight(const kernel_t *kernel, const tensor_t *weight, problem_t *problem) {
    if (weight->axes != kernel->spatial + 2) return "the weight must have two axes more than strides has numbers";
    if (weight->sizes[0] % kernel->group) return "the weight's first size must be a multiple of group";
    problem->groups = kernel->group, problem->group_out = weight->sizes[0] / kernel->group;
    problem->group_in = weight->sizes[1];
    for (int axis = 0; axis < 3; axis++) {
        const int64_t from = axis - (3 - kernel->spatial);
        problem->kernel[axis] = from < 0 ? 1 : weight->sizes[2 + from];
        problem->stride[axis] = kernel->stride[axis], problem->dilation[axis] = kernel->dilation[axis];
        problem->padding[axis] = kernel->before[axis];
    }
    if (product(weight->sizes) < 1 || product(problem->kernel) < 1) return "the weight must not be empty";
    if (product(problem->kernel) > MAX_TAPS) return "kernels have 512 taps at the most";
    return NULL;
}

static const char *read_problem(const kernel_t *kernel, const tensor_t *inputs, problem_t *problem) {
    const tensor_t *input = &inputs[0], *weight = &inputs[1], *gain = &inputs[2], *bias = &inputs[3];
    const char *obstacle = read_weight(kernel, weight, problem);
    if (obstacle) return obstacle;
    if (input->axes != weight->axes) return "the input must have as many axes as the weight";
    if (input->sizes[1] != problem->group_in * problem->groups)
        return "the input's channels must be group times the weight's second size";
    problem->batch = input->sizes[0], problem->blocks = gain->axes == 4 ? gain->sizes[2] : 0;
    if (problem->blocks < 1 || gain->sizes[0] != problem->batch || gain->sizes[1] != weight->sizes[0] ||
        gain->sizes[3] != product(problem->kernel) || problem->group_in % problem->blocks)
        return "the gain must have the shape (batch, output channels, blocks of input channels, taps)";
    if (bias->data && (bias->axes != 1 || bias->sizes[0] != weight->sizes[0]))
        return "the bias must have one number for each output channel";
    for (int axis = 0; axis < 3; axis++) {
        const int64_t from = axis - (3 - kernel->spatial);
        problem->size[axis] = from < 0 ? 1 : input->sizes[2 + from];
        const int64_t span = problem->size[axis] + kernel->before[axis] + kernel->after[axis] - kernel_extent(problem, axis);
        if (span < 0) return "the input must be as large as the kernel at least, with its padding";
        problem->out_size[axis] = span / kernel->stride[axis] + 1;
    }
    return NULL;
}

static status_t *compute(void *state, context_t *context) {
    const kernel_t *kernel = state;
    const runtime_t *runtime = kernel->runtime;
    tensor_t inputs[4] = {{0}};
    call_t call = {.kernel = kernel};
    size_t count;
    TRY(runtime->count_inputs(context, &count));
    for (size_t i = 0; i < count && i < 4; i++) {
        const value_t *value = NULL;
        TRY(runtime->get_input(context, i, &value));
        if (value) TRY(read_tensor(runtime, value, &inputs[i]));
    }
    const char *obstacle = read_problem(kernel, inputs, &call.problem);
    if (obstacle) return invalid(runtime, obstacle);
    int64_t sizes[MOST_AXES] = {call.problem.batch, inputs[1].sizes[0]};
    for (int64_t axis = 0; axis < kernel->spatial; axis++) sizes[2 + axis] = call.problem.out_size[3 - kernel->spatial + axis];
    value_t *output;
    TRY(runtime->get_output(context, 0, sizes, kernel->spatial + 2, &output));
    TRY(runtime->data_of(output, (void **)&call.output));
    if (call.problem.batch == 0) return NULL;
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    call.problem.threads = processors > 0 ? processors : 1;
    call.input = inputs[0].data, call.weight = inputs[1].data, call.gain = inputs[2].data, call.bias = inputs[3].data;
    return run(&call, context);
}

/* Three axes of a list of one to three; the first ones are absent then. */
static status_t *read_list(kernel_t *kernel, const info_t *info, const char *name, int64_t absent, int64_t least_number,
                           int64_t *numbers) {
    int64_t found[3];
    size_t count = 3;
    TRY(kernel->runtime->integers_attribute(info, name, found, &count));
    if (count < 1 || (kernel->spatial && kernel->spatial != (int64_t)count))
        return invalid(kernel->runtime, "strides, dilations and pads must be for the same one to three axes");
    kernel->spatial = count;
    for (int64_t axis = 0; axis < 3; axis++) {
        const int64_t from = axis - (3 - (int64_t)count);
        numbers[axis] = from < 0 ? absent : found[from];
        if (numbers[axis] < least_number) return invalid(kernel->runtime, "strides and dilations must be positive");
    }
    return NULL;
}

static status_t *read_attributes(kernel_t *kernel, const info_t *info) {
    const runtime_t *runtime = kernel->runtime;
    int64_t pads[6];
    size_t count = 6;
    TRY(read_list(kernel, info, "strides", 1, 1, kernel->stride));
    TRY(read_list(kernel, info, "dilations", 1, 1, kernel->dilation));
    TRY(runtime->integers_attribute(info, "pads", pads, &count));
    if ((int64_t)count != 2 * kernel->spatial) return invalid(runtime, "pads must have two numbers for each axis");
    for (int64_t axis = 0; axis < kernel->spatial; axis++) {
        const int64_t at = 3 - kernel->spatial + axis;
        kernel->before[at] = pads[axis], kernel->after[at] = pads[kernel->spatial + axis];
        if (least(pads[axis], pads[kernel->spatial + axis]) < 0) return invalid(runtime, "pads must not be negative");
    }
    TRY(runtime->integer_attribute(info, "group", &kernel->group));
    if (kernel->group < 1) return invalid(runtime, "group must be positive");
    TRY(runtime->float_attribute(info, "minimum", &kernel->minimum));
    return runtime->float_attribute(info, "maximum", &kernel->maximum);
}

/* Packs weights that do not change once. */
static status_t *pack_constant(kernel_t *kernel, const info_t *info) {
    const value_t *value = NULL;
    int constant = 0;
    tensor_t weight;
    problem_t problem = {0};
    TRY(kernel->runtime->constant_input(info, 1, &constant, &value));
    if (!constant || !value) return NULL;
    TRY(read_tensor(kernel->runtime, value, &weight));
    const char *obstacle = read_weight(kernel, &weight, &problem);
    if (obstacle) return invalid(kernel->runtime, obstacle);
    if (in_lines(problem.group_out)) return NULL;
    kernel->packed = malloc(problem.groups * packed_group(&problem) * sizeof(real));
    if (!kernel->packed) return kernel->runtime->create_status(FAILED, "awconv's AWConv: no memory for its weights");
    for (int64_t i = 0; i < problem.groups * panels_of(&problem); i++) pack(&problem, weight.data, i, kernel->packed);
    return NULL;
}

static void destroy(void *state) {
    kernel_t *kernel = state;
    if (kernel->memory) kernel->runtime->release_memory(kernel->memory);
    free(kernel->packed);
    free(kernel);
}

static status_t *create(const operator_t *operator, const runtime_t *runtime, const info_t *info, void **state) {
    (void)operator;
    kernel_t *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return runtime->create_status(FAILED, "awconv's AWConv: no memory");
    kernel->runtime = runtime;
    status_t *status = read_attributes(kernel, info);
    if (!status) status = runtime->create_memory(ARENA, 0, &kernel->memory);
    if (!status) status = pack_constant(kernel, info);
    if (status)
        destroy(kernel);
    else
        *state = kernel;
    return status;
}

static const char *name(const operator_t *operator) { return (void)operator, "AWConv"; }
static const char *provider(const operator_t *operator) { return (void)operator, "CPUExecutionProvider"; }
static int type(const operator_t *operator, size_t index) { return (void)operator, (void)index, FLOAT_ELEMENTS; }
static size_t inputs(const operator_t *operator) { return (void)operator, 4; }
static size_t outputs(const operator_t *operator) { return (void)operator, 1; }
static int input_kind(const operator_t *operator, size_t index) { return (void)operator, index == 3 ? OPTIONAL : REQUIRED; }
static int zero_of(const operator_t *operator, size_t index) { return (void)operator, (void)index, 0; }
static int one(const operator_t *operator) { return (void)operator, 1; }

static const operator_t AW_CONV = {
    .version = RUNTIME_VERSION, .name = name, .provider = provider, .input_type = type, .inputs = inputs,
    .output_type = type, .outputs = outputs, .destroy = destroy, .input_kind = input_kind, .output_kind = zero_of,
    .input_memory = zero_of, .least_inputs = one, .inputs_alike = one, .least_outputs = one, .outputs_alike = one,
    .create = create, .compute = compute, .first_version = one, .last_version = one,
};

/* What ONNX Runtime calls when a session's options register the library. It keeps the domain for as long as sessions use
 * it, and says nothing when they no longer do: it is never released. */
EXPORTED status_t *RegisterCustomOps(options_t *options, const runtime_base_t *base) {
    const runtime_t *runtime = base->get(RUNTIME_VERSION);
    if (!runtime) {
        char text[200];
        snprintf(text, sizeof text, "awconv's operator needs ONNX Runtime 1.17 or later, and this is %s",
                 base->version_text());
        runtime = base->get(1);
        return runtime ? runtime->create_status(FAILED, text) : NULL;
    }
    domain_t *domain;
    TRY(runtime->create_domain("awconv", &domain));
    TRY(runtime->add_to_domain(domain, &AW_CONV));
    return runtime->add_domain(options, domain);
}
