// The symbols of Android's libc that ONNX Runtime's JNI library for Android needs, implemented on glibc, so
// that the app's backend runs on a Linux JVM. Both libcs keep the stack guard at the same address on x86-64.
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern int __cxa_atexit(void (*)(void *), void *, void *);
extern void __cxa_finalize(void *);
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *);
extern void __stack_chk_fail(void);

#define BIONIC(type, name, parameters, arguments) \
    type bionic_##name parameters { return name arguments; } \
    __asm__(".symver bionic_" #name "," #name "@LIBC");

BIONIC(int, __cxa_atexit, (void (*f)(void *), void *argument, void *library), (f, argument, library))
BIONIC(int, __register_atfork, (void (*a)(void), void (*b)(void), void (*c)(void), void *library), (a, b, c, library))
BIONIC(int, dlclose, (void *library), (library))
BIONIC(void *, malloc, (size_t bytes), (bytes))
BIONIC(void *, realloc, (void *memory, size_t bytes), (memory, bytes))
BIONIC(void *, memcpy, (void *to, const void *from, size_t bytes), (to, from, bytes))
BIONIC(size_t, strlen, (const char *text), (text))
BIONIC(void, free, (void *memory), (memory))
BIONIC(void, __cxa_finalize, (void *library), (library))
BIONIC(void, __stack_chk_fail, (void), ())

// Desktop builds have no NNAPI, and nothing here uses it.
void *no_nnapi(void *options, uint32_t flags) {
    (void)options;
    (void)flags;
    abort();
}
__asm__(".symver no_nnapi,OrtSessionOptionsAppendExecutionProvider_Nnapi@VERS_1.29.0");
