/* The few functions of the CUDA driver that autograd looks up: there is no context. Built as libcuda.so.1 by scripts/check_dispatcher.py. */
int cuInit(unsigned flags) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 0;
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "there is no driver"; return 0; }
