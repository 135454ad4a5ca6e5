/* The part of the CUDA driver that Triton calls, for a machine without a GPU. Every call succeeds.
   A launch is only compared with the limits of a device. */
#include "cuda.h"

#define PROCESSORS 132
#define SHARED_OF_BLOCK 232448
#define MOST_HOST_POINTERS 64

static CUcontext context = (CUcontext)0x10;
static CUdeviceptr host_pointers[MOST_HOST_POINTERS];
static int host_count;
static int launches, refused, maps;

/* The test calls these through ctypes. */
int stub_launches(void) { return launches; }
int stub_refused(void) { return refused; }
int stub_maps(void) { return maps; }
void stub_on_host(CUdeviceptr pointer) {
    if (host_count < MOST_HOST_POINTERS) host_pointers[host_count++] = pointer;
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *current) { *current = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext wanted) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
    *retained = context;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OF_BLOCK; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = PROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "refused by the stub of the driver";
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)0x20; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)0x30;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
    *n = 1;
    return CUDA_SUCCESS;
}

static cuuint64_t size_of(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
    }
}

/* What the driver's documentation asks of a descriptor that is not interleaved. */
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    cuuint64_t size = size_of(type), inner = box[0] * size;
    int bad = (size_t)map % 64 || (size_t)address % 16 || rank < 1 || rank > 5 || inner % 16 ||
              interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
              (swizzle == CU_TENSOR_MAP_SWIZZLE_32B && inner > 32) ||
              (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && inner > 64) ||
              (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && inner > 128);
    for (cuuint32_t i = 0; i < rank && !bad; i++)
        bad = !shape[i] || shape[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8;
    for (cuuint32_t i = 0; i + 1 < rank && !bad; i++)
        bad = strides[i] % 16 || strides[i] >= 1ull << 40 ||
              strides[i] < (i ? strides[i - 1] : size) * shape[i];
    maps++;
    refused += bad;
    return bad ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* The driver does not know host memory, so it refuses the pointers that the test named as such. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    for (int i = 0; i < host_count; i++)
        if (host_pointers[i] == pointer) {
            refused++;
            return CUDA_ERROR_INVALID_VALUE;
        }
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **args, void **extra) {
    unsigned long programs = (unsigned long)config->gridDimX * config->gridDimY * config->gridDimZ;
    int cooperative = 0;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            cooperative = config->attrs[i].value.cooperative;
    launches++;
    if (config->sharedMemBytes > SHARED_OF_BLOCK || config->gridDimY > 65535 ||
        config->gridDimZ > 65535 || config->blockDimX > 1024 || (cooperative && programs > PROCESSORS)) {
        refused++;
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
