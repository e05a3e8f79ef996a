/* What the operator uses of ONNX Runtime's C interface, version 17 (ONNX Runtime 1.17) and later.
 *
 * The interface is a table of functions. Later versions append to it, and never move what is there: a function is known
 * by its place. tests/export/test_operator.py calls each of these.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { RUNTIME_VERSION = 17 };
enum { FAILED = 1, INVALID_ARGUMENT = 2 }; /* codes of errors */
enum { FLOAT_ELEMENTS = 1 };               /* a type of tensors */
enum { REQUIRED = 0, OPTIONAL = 1 };       /* inputs and outputs */
enum { ARENA = 1 };                        /* a kind of allocator */

typedef struct status status_t; /* null for success */
typedef struct options options_t;
typedef struct domain domain_t;
typedef struct value value_t;
typedef struct shape shape_t;
typedef struct info info_t;       /* of a node, when its kernel is made */
typedef struct context context_t; /* of a call */
typedef struct memory memory_t;

typedef struct allocator {
    uint32_t version;
    void *(*allocate)(struct allocator *, size_t bytes);
    void (*release)(struct allocator *, void *);
} allocator_t; /* its first members */

struct operator;

typedef struct {
    status_t *(*create_status)(int code, const char *text);
    void *before_26[25];
    status_t *(*create_domain)(const char *name, domain_t **);
    status_t *(*add_to_domain)(domain_t *, const struct operator *);
    status_t *(*add_domain)(options_t *, domain_t *);
    void *before_51[22];
    status_t *(*data_of)(value_t *, void **);
    void *before_61[9];
    status_t *(*axes_of)(const shape_t *, size_t *);
    status_t *(*sizes_of)(const shape_t *, int64_t *sizes, size_t axes);
    void *before_65[2];
    status_t *(*shape_of)(const value_t *, shape_t **);
    void *before_69[3];
    status_t *(*create_memory)(int allocator, int kind, memory_t **);
    void *before_85[15];
    status_t *(*float_attribute)(const info_t *, const char *name, float *);
    status_t *(*integer_attribute)(const info_t *, const char *name, int64_t *);
    void *before_88[1];
    status_t *(*count_inputs)(const context_t *, size_t *);
    void *before_90[1];
    status_t *(*get_input)(const context_t *, size_t index, const value_t **);
    status_t *(*get_output)(context_t *, size_t index, const int64_t *sizes, size_t axes, value_t **);
    void *before_94[2];
    void (*release_memory)(memory_t *);
    void *before_99[4];
    void (*release_shape)(shape_t *);
    void *before_163[63];
    status_t *(*integers_attribute)(const info_t *, const char *name, int64_t *, size_t *count);
    void *before_249[85];
    status_t *(*constant_input)(const info_t *, size_t index, int *constant, const value_t **);
    void *before_253[3];
    status_t *(*allocator_of)(const context_t *, const memory_t *, allocator_t **);
    void *before_274[20];
    status_t *(*in_parallel)(const context_t *, void (*run)(void *work, size_t index), size_t count,
                             size_t most_batches, void *work);
} runtime_t; /* its first functions; those that are not used have no names */

_Static_assert(offsetof(runtime_t, create_status) == 0 * sizeof(void *), "the place of create_status");
_Static_assert(offsetof(runtime_t, in_parallel) == 274 * sizeof(void *), "the place of in_parallel");

typedef struct {
    const runtime_t *(*get)(uint32_t version); /* null for a version that it does not have */
    const char *(*version_text)(void);
} runtime_base_t;

/* An operator: its description, and the functions of its kernels. Null pointers end it: nothing of later versions. */
typedef struct operator {
    uint32_t version;
    void *unused_create;
    const char *(*name)(const struct operator *);
    const char *(*provider)(const struct operator *);
    int (*input_type)(const struct operator *, size_t);
    size_t (*inputs)(const struct operator *);
    int (*output_type)(const struct operator *, size_t);
    size_t (*outputs)(const struct operator *);
    void *unused_compute;
    void (*destroy)(void *);
    int (*input_kind)(const struct operator *, size_t);
    int (*output_kind)(const struct operator *, size_t);
    int (*input_memory)(const struct operator *, size_t);
    int (*least_inputs)(const struct operator *);
    int (*inputs_alike)(const struct operator *);
    int (*least_outputs)(const struct operator *);
    int (*outputs_alike)(const struct operator *);
    status_t *(*create)(const struct operator *, const runtime_t *, const info_t *, void **);
    status_t *(*compute)(void *, context_t *);
    void *infer_shape;
    int (*first_version)(const struct operator *);
    int (*last_version)(const struct operator *);
    void *later[4];
} operator_t;
