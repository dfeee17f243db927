/* A stand-in for libcusparseLt.so.0 on host memory: the interface of 0.8.1 as the binding uses it.
 *
 * It checks what the library's documentation demands of every call and remembers the first breach; it records every
 * call; and it computes, so that what comes out of the binding can be compared with a reference. Its compressed operand
 * is [values | metadata] like the real one is believed to be, with the metadata scrambled; `standin_set` makes it
 * differ in the ways in which the real one might. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 3, NOT_SUPPORTED = 10 };
enum { HALF = 2, BFLOAT16 = 14 };
enum { COLUMN_MAJOR = 1, ROW_MAJOR = 2 };

/* Settings. */
enum { SCRAMBLED_BLOCKS = 0, LINEAR = 1, SCRAMBLED_WHOLE = 2, OTHER_CODES = 3, TWICE = 4, PADDED = 5 };
enum { VALUES_FIRST = 0, METADATA_FIRST = 1, VALUES_BY_COLUMN = 2 };
static struct {
    int64_t major, minor, patch, init_status, metadata, values, highest_algorithm, wrong_algorithm, failing_algorithm;
    int64_t workspace, no_product, delay_us, segment_k, inclusive;
} settings;

/* What happened. */
#define MOST_CALLS 200000
typedef struct {
    char name[48];
    int64_t arguments[11];
} Call;
static Call *calls;
static int64_t call_count, live_structures, generation;
static char breach[256];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int inside;

static void broken(const char *what) {
    if (!breach[0]) snprintf(breach, sizeof breach, "%s", what);
}
#define DEMAND(condition, what) \
    do { \
        if (!(condition)) { \
            broken(what); \
            return INVALID_VALUE; \
        } \
    } while (0)

static void record(const char *name, int count, const int64_t *arguments) {
    pthread_mutex_lock(&mutex);
    if (call_count < MOST_CALLS) {
        Call *call = &calls[call_count++];
        memset(call, 0, sizeof *call);
        snprintf(call->name, sizeof call->name, "%s", name);
        memcpy(call->arguments, arguments, count * sizeof *arguments);
    }
    pthread_mutex_unlock(&mutex);
}
#define P(pointer) ((int64_t)(intptr_t)(pointer))
#define RECORD(...) \
    do { \
        int64_t list[] = {__VA_ARGS__}; \
        record(__func__, sizeof list / sizeof *list, list); \
    } while (0)

void standin_set(const char *name, int64_t value) {
#define SETTING(field) \
    if (!strcmp(name, #field)) settings.field = value
    SETTING(major);
    SETTING(minor);
    SETTING(patch);
    SETTING(init_status);
    SETTING(metadata);
    SETTING(values);
    SETTING(highest_algorithm);
    SETTING(wrong_algorithm);
    SETTING(failing_algorithm);
    SETTING(workspace);
    SETTING(no_product);
    SETTING(delay_us);
    SETTING(segment_k);
    SETTING(inclusive);
}

void standin_reset(void) {
    if (!calls) calls = malloc(MOST_CALLS * sizeof *calls);
    memset(&settings, 0, sizeof settings);
    settings.minor = 8;
    settings.patch = 1;
    settings.highest_algorithm = 3;
    settings.wrong_algorithm = settings.failing_algorithm = -1;
    settings.workspace = 4096;
    /* The one setting that a child process must see. */
    const char *segment_k = getenv("STANDIN_SEGMENT_K");
    settings.segment_k = segment_k ? atoi(segment_k) : 0;
    call_count = live_structures = 0;
    generation++;
    breach[0] = 0;
}

__attribute__((constructor)) static void loaded(void) { standin_reset(); }

int64_t standin_count(void) { return call_count; }
int64_t standin_live(void) { return live_structures; }
const char *standin_breach(void) { return breach; }
const char *standin_name(int64_t call) { return calls[call].name; }
const int64_t *standin_arguments(int64_t call) { return calls[call].arguments; }
void standin_forget_calls(void) { call_count = 0; }

/* Structures: what they are, and whether they are. */
enum { HANDLE = 0x68616e64, MATRIX, PRODUCT, SELECTION, PLAN };
typedef struct {
    int64_t kind, live, generation;
} Head;
typedef struct {
    Head head;
    int64_t rows, columns, leading;
    int type, order, structured;
} Matrix;
typedef struct {
    Head head;
    const Matrix *a, *b, *c, *d;
    int op_b;
    const void *bias;
} Product;
typedef struct {
    Head head;
    const Product *product;
    int config, split_k;
} Selection;
typedef struct {
    Head head;
    const Product *product;
    const Selection *selection;
    const void *bias;
    int config, split_k;
} Plan;

static int is(const void *structure, int64_t kind) {
    const Head *head = structure;
    return structure && !(P(structure) % 16) && head->kind == kind && head->live;
}

static void make(void *structure, int64_t kind, size_t size) {
    memset(structure, 0, size);
    *(Head *)structure = (Head){kind, 1, generation};
    live_structures++;
}

/* What Python's collector destroys of a test gone by, in the middle of another, is none of the other's business. */
#define UNLESS_OF_BEFORE(structure, kind) \
    do { \
        if (is(structure, kind) && ((const Head *)structure)->generation != generation) return SUCCESS; \
    } while (0)

static int destroy(void *structure, int64_t kind) {
    DEMAND(is(structure, kind), "a structure is destroyed that is none, or was before");
    memset(structure, 0xee, 64);
    live_structures--;
    return SUCCESS;
}

#define HANDLED(handle) \
    do { \
        if (!is(handle, HANDLE)) { \
            broken("the handle is not initialised"); \
            return NOT_INITIALIZED; \
        } \
    } while (0)

int cusparseLtInit(void *handle) {
    RECORD(P(handle));
    if (settings.init_status) return settings.init_status;
    DEMAND(handle && !(P(handle) % 16), "a structure is not aligned");
    make(handle, HANDLE, 512);
    live_structures--; /* A handle lives as long as the process. */
    return SUCCESS;
}
int cusparseLtDestroy(const void *handle) {
    RECORD(P(handle));
    live_structures++;
    return destroy((void *)handle, HANDLE);
}
int cusparseLtGetProperty(int part, int *value) {
    RECORD(part, P(value));
    *value = part == 0 ? settings.major : part == 1 ? settings.minor : settings.patch;
    return SUCCESS;
}
const char *cusparseLtGetErrorName(int status) {
    return status == NOT_SUPPORTED     ? "CUSPARSE_STATUS_NOT_SUPPORTED"
           : status == INVALID_VALUE   ? "CUSPARSE_STATUS_INVALID_VALUE"
           : status == NOT_INITIALIZED ? "CUSPARSE_STATUS_NOT_INITIALIZED"
                                       : "CUSPARSE_STATUS_OTHER";
}
const char *cusparseLtGetErrorString(int status) {
    return status == NOT_SUPPORTED ? "operation not supported" : "something else";
}

static int describe(Matrix *matrix, int64_t rows, int64_t columns, int64_t leading, uint32_t alignment, int type,
                    int order, int multiple, int structured) {
    DEMAND(matrix && !(P(matrix) % 16), "a structure is not aligned");
    DEMAND(type == HALF || type == BFLOAT16, "the type is not of 16 bits");
    DEMAND(order == ROW_MAJOR || order == COLUMN_MAJOR, "the order is none");
    DEMAND(alignment && !(alignment % 16), "the alignment is no multiple of 16");
    DEMAND(leading >= (order == ROW_MAJOR ? columns : rows), "the leading dimension is too small");
    DEMAND(rows > 0 && columns > 0 && !(rows % multiple) && !(columns % multiple) && !(leading % multiple),
           "a size is not of the multiple that the library demands");
    make(matrix, MATRIX, 512);
    Head head = matrix->head;
    *matrix = (Matrix){head, rows, columns, leading, type, order, structured};
    return SUCCESS;
}
int cusparseLtDenseDescriptorInit(const void *handle, Matrix *matrix, int64_t rows, int64_t columns, int64_t leading,
                                  uint32_t alignment, int type, int order) {
    RECORD(P(handle), P(matrix), rows, columns, leading, alignment, type, order);
    HANDLED(handle);
    return describe(matrix, rows, columns, leading, alignment, type, order, 8, 0);
}
int cusparseLtStructuredDescriptorInit(const void *handle, Matrix *matrix, int64_t rows, int64_t columns,
                                       int64_t leading, uint32_t alignment, int type, int order, int sparsity) {
    RECORD(P(handle), P(matrix), rows, columns, leading, alignment, type, order, sparsity);
    HANDLED(handle);
    DEMAND(sparsity == 0, "the sparsity is none");
    return describe(matrix, rows, columns, leading, alignment, type, order, 16, 1);
}
int cusparseLtMatDescriptorDestroy(const void *matrix) {
    UNLESS_OF_BEFORE(matrix, MATRIX);
    RECORD(P(matrix));
    return destroy((void *)matrix, MATRIX);
}

int cusparseLtMatmulDescriptorInit(const void *handle, Product *product, int op_a, int op_b, const Matrix *a,
                                   const Matrix *b, const Matrix *c, const Matrix *d, int compute) {
    RECORD(P(handle), P(product), op_a, op_b, P(a), P(b), P(c), P(d), compute);
    HANDLED(handle);
    DEMAND(is(a, MATRIX) && is(b, MATRIX) && is(c, MATRIX) && is(d, MATRIX), "a matrix is not described");
    DEMAND(a->structured && !b->structured, "the first matrix is not the structured one");
    DEMAND(op_a == 0 && (op_b == 0 || op_b == 1), "an operation is none that the stand-in computes");
    DEMAND(a->type == b->type && b->type == c->type && c->type == d->type && compute == 2, "types do not agree");
    int64_t k = op_b ? b->columns : b->rows, n = op_b ? b->rows : b->columns;
    DEMAND(a->columns == k && a->rows == d->rows && n == d->columns, "sizes do not agree");
    DEMAND(c->rows == d->rows && c->columns == d->columns && c->order == d->order && c->leading == d->leading,
           "the addend is not as the result");
    DEMAND(a->order == ROW_MAJOR && d->order == COLUMN_MAJOR, "an order is none that the stand-in computes");
    make(product, PRODUCT, 512);
    live_structures--; /* The library has no call that destroys one. */
    Head head = product->head;
    *product = (Product){head, a, b, c, d, op_b, NULL};
    return SUCCESS;
}
int cusparseLtMatmulDescSetAttribute(const void *handle, Product *product, int attribute, const void *data,
                                     size_t size) {
    RECORD(P(handle), P(product), attribute, P(*(void **)data), size);
    HANDLED(handle);
    DEMAND(is(product, PRODUCT), "the product is not described");
    DEMAND(attribute == 8 && size == sizeof(void *), "the attribute is not the bias, or has another size");
    product->bias = *(void **)data;
    return SUCCESS;
}

int cusparseLtMatmulAlgSelectionInit(const void *handle, Selection *selection, const Product *product, int kind) {
    RECORD(P(handle), P(selection), P(product), kind);
    HANDLED(handle);
    DEMAND(is(product, PRODUCT) && kind == 0, "the product is not described, or the kind is none");
    DEMAND(selection && !(P(selection) % 16), "a structure is not aligned");
    make(selection, SELECTION, 512);
    selection->product = product;
    return SUCCESS;
}
int cusparseLtMatmulAlgSelectionDestroy(const void *selection) {
    UNLESS_OF_BEFORE(selection, SELECTION);
    RECORD(P(selection));
    return destroy((void *)selection, SELECTION);
}
int cusparseLtMatmulAlgSetAttribute(const void *handle, Selection *selection, int attribute, const int *data,
                                    size_t size) {
    RECORD(P(handle), P(selection), attribute, *data, size);
    HANDLED(handle);
    DEMAND(is(selection, SELECTION) && size == sizeof(int), "no selection, or another size");
    if (attribute == 0) {
        if (*data < 0 || *data >= settings.highest_algorithm + settings.inclusive) return INVALID_VALUE;
        selection->config = *data;
        return SUCCESS;
    }
    DEMAND(attribute == 3, "the attribute is none that is set here");
    selection->split_k = *data;
    return SUCCESS;
}
int cusparseLtMatmulAlgGetAttribute(const void *handle, const Selection *selection, int attribute, int *data,
                                    size_t size) {
    RECORD(P(handle), P(selection), attribute, P(data), size);
    HANDLED(handle);
    DEMAND(is(selection, SELECTION) && size == sizeof(int) && attribute == 1, "not the highest algorithm");
    *data = settings.highest_algorithm;
    return SUCCESS;
}

int cusparseLtMatmulPlanInit(const void *handle, Plan *plan, const Product *product, const Selection *selection) {
    RECORD(P(handle), P(plan), P(product), P(selection));
    HANDLED(handle);
    DEMAND(is(product, PRODUCT) && is(selection, SELECTION), "the product is not described, or no algorithm selected");
    DEMAND(selection->product == product, "the algorithm is of another product");
    DEMAND(plan && !(P(plan) % 16), "a structure is not aligned");
    if (selection->config == settings.failing_algorithm) return NOT_SUPPORTED;
    if (selection->split_k == -1) {
        if (settings.segment_k == 0) return NOT_SUPPORTED;
        if (settings.segment_k == 2) sleep(600);
    }
    make(plan, PLAN, 512);
    Head head = plan->head;
    *plan = (Plan){head, product, selection, product->bias, selection->config, selection->split_k};
    return SUCCESS;
}
int cusparseLtMatmulPlanDestroy(const void *plan) {
    UNLESS_OF_BEFORE(plan, PLAN);
    RECORD(P(plan));
    return destroy((void *)plan, PLAN);
}
int cusparseLtMatmulGetWorkspace(const void *handle, const Plan *plan, size_t *size) {
    RECORD(P(handle), P(plan), P(size));
    HANDLED(handle);
    DEMAND(is(plan, PLAN), "the plan is none");
    *size = plan->config % 2 ? settings.workspace : 0;
    return SUCCESS;
}

/* Numbers. */
static float from_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}
static float to_float(uint16_t bits, int type) {
    if (type == BFLOAT16) return from_bits((uint32_t)bits << 16);
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? ldexpf(1024 + fraction, exponent - 25)
                                : ldexpf(fraction, -24);
    return bits >> 15 ? -size : size;
}
static uint16_t from_float(float number, int type) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (type == BFLOAT16) return isnan(number) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint16_t sign = bits >> 16 & 0x8000;
    if (isnan(number)) return sign | 0x7e00;
    float size = fabsf(number);
    if (size >= 65520) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);
    if (!size || exponent < -13) return sign | (uint16_t)rintf(ldexpf(size, 24)); /* 1024 carries into the exponent. */
    return sign | (uint16_t)(((exponent + 13) << 10) + (uint16_t)rintf(ldexpf(size, 11 - exponent)));
}

/* The operand. */
static int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }
static int64_t place_of(int64_t group, int64_t rows, int64_t columns) {
    int64_t groups = rows * columns / 4, block = settings.metadata == SCRAMBLED_WHOLE ? groups : 16 * columns / 4;
    if (settings.metadata == LINEAR) return group;
    if (settings.metadata == TWICE) return group;
    int64_t factor = 37;
    while (common_divisor(factor, block) != 1) factor += 2;
    return group / block * block + (group % block * factor + 5) % block;
}
static int64_t bytes_of(const Matrix *a) {
    return a->rows * a->columns + a->rows * a->columns / 8 + (settings.metadata == PADDED ? 128 : 0);
}
static uint16_t *values_of(const Matrix *a, const void *operand) {
    return (uint16_t *)((char *)operand + (settings.values == METADATA_FIRST ? a->rows * a->columns / 8 : 0));
}
static uint8_t *metadata_of(const Matrix *a, const void *operand) {
    return (uint8_t *)operand + (settings.values == METADATA_FIRST ? 0 : a->rows * a->columns);
}
static uint16_t *value_at(const Matrix *a, const void *operand, int64_t group, int slot) {
    int64_t kept = a->columns / 2, row = group * 2 / kept, column = group * 2 % kept + slot;
    int64_t index = settings.values == VALUES_BY_COLUMN ? column * a->rows + row : row * kept + column;
    return values_of(a, operand) + index;
}
static int code_at(const Matrix *a, const void *operand, int64_t group) {
    int64_t place = place_of(group, a->rows, a->columns);
    int nibble = metadata_of(a, operand)[place / 2] >> (place % 2 ? 4 : 0) & 15;
    return settings.metadata == OTHER_CODES ? nibble ^ 15 : nibble;
}

int cusparseLtSpMMACompressedSize2(const void *handle, const Matrix *a, size_t *size, size_t *scratch) {
    RECORD(P(handle), P(a), P(size), P(scratch));
    HANDLED(handle);
    DEMAND(is(a, MATRIX) && a->structured, "the matrix is not a structured one");
    *size = bytes_of(a);
    *scratch = 512;
    return SUCCESS;
}
int cusparseLtSpMMACompress2(const void *handle, const Matrix *a, int is_a, int op, const uint16_t *dense,
                             void *operand, void *scratch, void *stream) {
    RECORD(P(handle), P(a), is_a, op, P(dense), P(operand), P(scratch), P(stream));
    HANDLED(handle);
    DEMAND(is(a, MATRIX) && a->structured && is_a == 1 && op == 0, "the matrix is not the structured first operand");
    DEMAND(dense && operand && scratch && !(P(dense) % 16) && !(P(operand) % 16), "a pointer is missing or unaligned");
    memset(scratch, 0xff, 512);
    memset(operand, 0, bytes_of(a));
    for (int64_t group = 0; group < a->rows * a->columns / 4; group++) {
        const uint16_t *four = dense + group * 4;
        int kept[2], count = 0;
        for (int position = 0; position < 4; position++) {
            if (!(four[position] & 0x7fff)) continue;
            DEMAND(count < 2, "a group holds more than two nonzeros");
            kept[count++] = position;
        }
        /* What is not there is taken from the end: other positions than a mask would name. */
        for (int position = 3; count < 2; position--) {
            if (count && kept[0] == position) continue;
            kept[count++] = position;
        }
        if (kept[0] > kept[1]) {
            int first = kept[1];
            kept[1] = kept[0];
            kept[0] = first;
        }
        for (int slot = 0; slot < 2; slot++) *value_at(a, operand, group, slot) = four[kept[slot]];
        int64_t place = place_of(group, a->rows, a->columns);
        int code = kept[0] | kept[1] << 2;
        if (settings.metadata == OTHER_CODES) code ^= 15;
        if (settings.metadata == TWICE)
            code = place % 2 ? metadata_of(a, operand)[place / 2] & 15 : code;
        metadata_of(a, operand)[place / 2] |= code << (place % 2 ? 4 : 0);
    }
    return SUCCESS;
}

int cusparseLtMatmul(const void *handle, const Plan *plan, const float *alpha, const void *operand, const uint16_t *x,
                     const float *beta, const uint16_t *addend, uint16_t *y, void *workspace, void **streams,
                     int32_t stream_count) {
    RECORD(P(handle), P(plan), P(alpha), P(operand), P(x), P(beta), P(addend), P(y), P(workspace),
           stream_count ? P(streams[0]) : -1, stream_count);
    HANDLED(handle);
    DEMAND(is(plan, PLAN) && is(plan->product, PRODUCT) && is(plan->selection, SELECTION), "the plan is none");
    const Product *product = plan->product;
    const Matrix *a = product->a, *b = product->b, *d = product->d;
    DEMAND(is(a, MATRIX) && is(b, MATRIX) && is(product->c, MATRIX) && is(d, MATRIX), "a matrix was destroyed");
    DEMAND(operand && x && addend && y, "a pointer is missing");
    DEMAND(!((P(operand) | P(x) | P(addend) | P(y) | P(plan->bias)) % 16), "a pointer is not aligned");
    DEMAND(streams && stream_count == 1, "no stream is given");
    DEMAND(!(plan->config % 2) || !settings.workspace || workspace, "the workspace is missing");
    if (settings.no_product) return SUCCESS;
    DEMAND(!__sync_fetch_and_add(&inside, 1), "two products at once with one handle");
    if (settings.delay_us) usleep(settings.delay_us);
    if (plan->config % 2 && settings.workspace) memset(workspace, 0xff, settings.workspace);
    int64_t groups = a->columns / 4;
    for (int64_t column = 0; column < d->columns; column++) {
        for (int64_t row = 0; row < d->rows; row++) {
            float sum = 0;
            for (int64_t group = row * groups; group < (row + 1) * groups; group++) {
                int code = code_at(a, operand, group);
                for (int slot = 0; slot < 2; slot++) {
                    int64_t k = (group - row * groups) * 4 + (code >> 2 * slot & 3);
                    int by_row = product->op_b ? b->order == ROW_MAJOR : b->order == COLUMN_MAJOR;
                    int64_t at = by_row ? column * b->leading + k : k * b->leading + column;
                    sum += to_float(*value_at(a, operand, group, slot), a->type) * to_float(x[at], a->type);
                }
            }
            int64_t at = column * d->leading + row;
            sum *= *alpha;
            if (*beta) sum += *beta * to_float(addend[at], a->type);
            if (plan->bias) sum += to_float(((const uint16_t *)plan->bias)[row], a->type);
            if (plan->config == settings.wrong_algorithm) sum += 1 + row % 3;
            y[at] = from_float(sum, a->type);
        }
    }
    __sync_fetch_and_sub(&inside, 1);
    return SUCCESS;
}
