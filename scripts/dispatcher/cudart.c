/* Answers what PyTorch asks the CUDA runtime before it chooses an attention kernel, as one GPU would whose compute
   capability is in the environment variable SM, such as 90. Preloaded by scripts/check_dispatcher.py in front of the real
   library. No kernel can run over it, and none has to: tensors there are fake, and have a shape but no numbers. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

static int capability(void) {
    const char *text = getenv("SM");
    return text ? atoi(text) : 90;
}

/* Bytes of shared memory that a block can ask for: CUDA C Programming Guide, technical specifications per compute capability */
static size_t shared_memory(void) {
    switch (capability()) {
        case 75: return 64 << 10;
        case 80: return 163 << 10;
        case 90: case 100: return 227 << 10;
        default: return 99 << 10;     /* 86, 89, 120 */
    }
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no GPU");
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->warpSize = 32;
    p->multiProcessorCount = 100;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = shared_memory();
    p->sharedMemPerMultiprocessor = shared_memory() + 1024;
    p->totalGlobalMem = (size_t)64 << 30;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability() / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability() % 10 : 0;
    return cudaSuccess;
}

/* Streams and events, which autograd makes and waits for: there is nothing to wait for */
#define HANDLE(type) ((type)16)
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { *s = HANDLE(cudaStream_t); return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = HANDLE(cudaEvent_t); return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return cudaSuccess; }
