// A CUDA driver that does nothing, for Triton's own launcher: an H200 in its answers, no kernel runs.
// Launches and tensor maps are checked against the limits of the CUDA C++ Programming Guide and of
// cuTensorMapEncodeTiled (CUDA Driver API); what NVIDIA's driver would refuse is refused.
#include "cuda.h"

#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))

enum { MAX_THREADS = 1024, MAX_SHARED = 232448, MAX_GRID_X = 2147483647, MAX_GRID_YZ = 65535 };

EXPORT unsigned long null_driver_launches = 0, null_driver_tensor_maps = 0;

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MAX_SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MAX_THREADS
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 128
                                                                : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "refused by the null driver";
  return CUDA_SUCCESS;
}
#undef cuDevicePrimaryCtxRetain
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
  *n = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
  *(CUdeviceptr *)value = p;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  null_driver_launches++;
  if (c->gridDimX > MAX_GRID_X || c->gridDimY > MAX_GRID_YZ || c->gridDimZ > MAX_GRID_YZ ||
      c->blockDimX > MAX_THREADS || c->sharedMemBytes > MAX_SHARED) {
    fprintf(stderr, "null driver: grid %u %u %u, %u threads, %u bytes of shared memory\n",
            c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

static int fits(int itemsize, cuuint32_t rank, const void *address, const cuuint64_t *dims,
                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                CUtensorMapSwizzle swizzle) {
  static const cuuint64_t span[] = {1ull << 40, 32, 64, 128, 128, 128, 128};
  if (rank < 1 || rank > 5 || (size_t)address % 16)
    return 0;
  for (cuuint32_t i = 0; i < rank; i++)
    if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8)
      return 0;
  for (cuuint32_t i = 0; i + 1 < rank; i++) {
    cuuint64_t inside = i ? strides[i - 1] : (cuuint64_t)itemsize;
    if (strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < dims[i] * inside ||
        (i && strides[i] % inside))
      return 0;
  }
  return (box[0] * itemsize) % 16 == 0 && box[0] * (cuuint64_t)itemsize <= span[swizzle];
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                       void *address, const cuuint64_t *dims,
                                       const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                                       CUtensorMapFloatOOBfill fill) {
  static const int itemsize[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  null_driver_tensor_maps++;
  if (fits(itemsize[type], rank, address, dims, strides, box, steps, swizzle))
    return CUDA_SUCCESS;
  fprintf(stderr, "null driver: tensor map of type %d, rank %u, at %p, swizzle %d\n", type, rank,
          address, swizzle);
  return CUDA_ERROR_INVALID_VALUE;
}
