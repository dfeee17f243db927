/* CUDA's runtime, and what torch asks of driver and NVML, on a machine without a card: "device" memory is memory of the
 * host, every call is synchronous, and no kernel can be launched. See rehearse.sh.
 *
 * Compiled once for each of the three libraries that it stands in for.
 * VCARD_COUNT: cards (1). VCARD_GIB: memory of each (139.8).
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define CARDS 16
#define RUNTIME 13000
#define OK cudaSuccess
#define NO cudaErrorNotSupported

static __thread cudaError_t last;
static __thread int current;
static int capturing;

static cudaError_t failed(cudaError_t error) {
  if (error != OK) last = error;
  return error;
}

static int cards(void) {
  const char *text = getenv("VCARD_COUNT");
  return text ? atoi(text) : 1;
}

static size_t card_bytes(void) {
  const char *text = getenv("VCARD_GIB");
  return (size_t)((text ? atof(text) : 139.8) * (1 << 30));
}

/* Memory. */

enum kind { HOST = 1, DEVICE };
typedef struct block {
  char *start;
  size_t bytes;
  enum kind kind;
  int card;
  struct block *next;
} block;
static block *blocks;
static size_t used[CARDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t take(void **pointer, size_t bytes, enum kind kind) {
  *pointer = NULL;
  bytes = (bytes + 4095) / 4096 * 4096;
  if (bytes == 0) bytes = 4096;
  if (kind == DEVICE && used[current] + bytes > card_bytes()) return failed(cudaErrorMemoryAllocation);
  void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  block *made = malloc(sizeof *made);
  pthread_mutex_lock(&lock);
  *made = (block){start, bytes, kind, current, blocks};
  blocks = made;
  if (kind == DEVICE) used[current] += bytes;
  pthread_mutex_unlock(&lock);
  *pointer = start;
  return OK;
}

static cudaError_t give(void *pointer) {
  if (!pointer) return OK;
  pthread_mutex_lock(&lock);
  block **place = &blocks;
  while (*place && (*place)->start != pointer) place = &(*place)->next;
  block *found = *place;
  if (found) {
    *place = found->next;
    if (found->kind == DEVICE) used[found->card] -= found->bytes;
    munmap(found->start, found->bytes);
    free(found);
  }
  pthread_mutex_unlock(&lock);
  return found ? OK : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void **p, size_t n) { return take(p, n, DEVICE); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return take(p, n, DEVICE); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return take(p, n, HOST); }
cudaError_t cudaFree(void *p) { return give(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return give(p); }
cudaError_t cudaFreeHost(void *p) { return give(p); }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) { return OK; }
cudaError_t cudaHostUnregister(void *p) { return OK; }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = card_bytes();
  *available = *total - used[current];
  return OK;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  found->device = -2;
  found->hostPointer = (void *)pointer;
  pthread_mutex_lock(&lock);
  for (block *b = blocks; b; b = b->next)
    if ((char *)pointer >= b->start && (char *)pointer < b->start + b->bytes) {
      found->type = b->kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
      found->device = b->card;
      found->devicePointer = (void *)pointer;
      found->hostPointer = b->kind == HOST ? (void *)pointer : NULL;
    }
  pthread_mutex_unlock(&lock);
  return OK;
}

static cudaError_t move(void *to, const void *from, size_t bytes) {
  memmove(to, from, bytes);
  return OK;
}

cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { return move(d, s, n); }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  return move(d, s, n);
}
cudaError_t cudaMemcpyPeerAsync(void *d, int a, const void *s, int b, size_t n, cudaStream_t t) {
  return move(d, s, n);
}
cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t width, size_t height,
                              enum cudaMemcpyKind k, cudaStream_t t) {
  for (size_t row = 0; row < height; row++) move((char *)d + row * dp, (const char *)s + row * sp, width);
  return OK;
}
cudaError_t cudaMemset(void *p, int value, size_t n) { return memset(p, value, n), OK; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) { return memset(p, value, n), OK; }
cudaError_t cudaMemcpyToSymbol(const void *s, const void *p, size_t n, size_t o, enum cudaMemcpyKind k) { return OK; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return failed(NO); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *value) {
  *(size_t *)value = 0;
  return OK;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *value) { return OK; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { return OK; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc *d, size_t n) { return OK; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int card) { return *p = (cudaMemPool_t)64, OK; }
cudaError_t cudaIpcCloseMemHandle(void *p) { return failed(NO); }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *h, void *p) { return failed(NO); }
cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t h, unsigned f) { return failed(NO); }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *h, cudaEvent_t e) { return failed(NO); }
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *e, cudaIpcEventHandle_t h) { return failed(NO); }

/* Cards. */

cudaError_t cudaGetDeviceCount(int *count) { return (*count = cards()) ? OK : failed(cudaErrorNoDevice); }
cudaError_t cudaGetDevice(int *card) { return *card = current, OK; }
cudaError_t cudaSetDevice(int card) {
  if (card < 0 || card >= cards()) return failed(cudaErrorInvalidDevice);
  current = card;
  return OK;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int card) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H200");
  found->totalGlobalMem = card_bytes();
  found->major = 9;
  found->multiProcessorCount = 132;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->l2CacheSize = 60 << 20;
  found->unifiedAddressing = 1;
  found->pciBusID = card + 1;
  found->uuid.bytes[0] = card + 1;
  return OK;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int card) {
  struct cudaDeviceProp of;
  cudaGetDeviceProperties(&of, card);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = of.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = of.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = of.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = of.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = of.sharedMemPerBlockOptin; break;
    case cudaDevAttrWarpSize: *value = of.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = of.maxThreadsPerBlock; break;
    case cudaDevAttrL2CacheSize: *value = of.l2CacheSize; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    default: *value = 1;
  }
  return OK;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int card) {
  snprintf(text, size, "0000:%02x:00.0", card + 1);
  return OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { return *low = 0, *high = -5, OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, OK; }
cudaError_t cudaDeviceEnablePeerAccess(int card, unsigned flags) { return OK; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = RUNTIME, OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = RUNTIME, OK; }
cudaError_t cudaProfilerStart(void) { return OK; }
cudaError_t cudaProfilerStop(void) { return OK; }

const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotSupported: return "not possible in a rehearsal";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "error";
  }
}
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = OK;
  return error;
}

/* Kernels: their names are kept, to say which one should have been computed by its operator. */

typedef struct kernel {
  const void *host;
  const char *name;
  struct kernel *next;
} kernel;
static kernel *kernels;

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
char __cudaInitModule(void **h) { return 1; }
void __cudaRegisterVar(void **h, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}
void __cudaRegisterFunction(void **h, const char *host, char *device, const char *name, int limit, void *a, void *b,
                            void *c, void *d, int *e) {
  kernel *made = malloc(sizeof *made);
  *made = (kernel){host, name, kernels};
  kernels = made;
}

static cudaError_t refuse(const void *host) {
  kernel *found = kernels;
  while (found && found->host != host) found = found->next;
  fprintf(stderr, "rehearsal: the kernel %s was launched, and there is no card\n", found ? found->name : "?");
  return failed(NO);
}

cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *host) { return *k = (cudaKernel_t)host, OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return refuse(k); }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return refuse(f); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return refuse(f); }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) {
  return refuse(f);
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t n, struct CUstream_st *s) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *n, void *s) {
  *n = 0;
  *(void **)s = NULL;
  return OK;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  return OK;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int value) { return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *f, int b, size_t n) {
  return *count = 1, OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *f, int b, size_t n,
                                                                   unsigned flags) {
  return *count = 1, OK;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *f = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return OK;
}

/* Streams, events and captures: what may not wait in a capture is refused. */

static cudaError_t wait(void) { return capturing ? failed(cudaErrorStreamCaptureUnsupported) : OK; }

typedef struct stream {
  int priority, capturing;
} stream;
static stream first;
static stream *of(cudaStream_t s) { return (size_t)s < 16 ? &first : (stream *)s; }
static unsigned long long captures;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  stream *made = calloc(1, sizeof *made + 64);
  made->priority = priority;
  return *s = (cudaStream_t)made, OK;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = of(s)->priority, OK; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait(); }
cudaError_t cudaDeviceSynchronize(void) { return wait(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *data, unsigned flags) {
  return call(s, OK, data), OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *data) { return call(data), OK; }

typedef struct event {
  struct timespec time;
  int recorded;
} event;

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  return *e = (cudaEvent_t)calloc(1, sizeof(event)), OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), OK; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  event *to = (event *)e;
  clock_gettime(CLOCK_MONOTONIC, &to->time);
  to->recorded = 1;
  return OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return wait(); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return wait(); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  event *start = (event *)a, *end = (event *)b;
  if (!start->recorded || !end->recorded) return failed(cudaErrorInvalidResourceHandle);
  *ms = (end->time.tv_sec - start->time.tv_sec) * 1e3 + (end->time.tv_nsec - start->time.tv_nsec) / 1e6;
  return OK;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  of(s)->capturing = 1;
  capturing++;
  captures++;
  return OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  of(s)->capturing = 0;
  capturing--;
  return *graph = (cudaGraph_t)64, OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = of(s)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  if (id) *id = captures;
  if (graph) *graph = (cudaGraph_t)64;
  if (count) *count = 0;
  return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return OK; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags) {
  return *e = (cudaGraphExec_t)64, OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { return OK; }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return OK; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return OK; }
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t g, const char *path, unsigned flags) { return OK; }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) { return *count = 1, OK; }
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t n, cudaGraphNode_t *nodes, cudaGraphEdgeData *edges,
                                         size_t *count) {
  return *count = 0, OK;
}

/* The driver: only what torch's first use of CUDA looks at does anything. */

int cuInit(unsigned flags) { return 0; }
int cuDevicePrimaryCtxGetState(int card, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)64, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "not possible in a rehearsal", 0; }

/* NVML: by it torch counts cards without touching CUDA, which would forbid to fork. */

int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = cards(), 0; }
