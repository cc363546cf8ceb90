// Loaded with LD_PRELOAD. Makes calls on files below one folder fail, once a process has called arm().
// Python calls arm() through ctypes, in the child that is to suffer, before it runs the command.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, FULL, WRITE, SHORT, READ, RENAME, CLOCK };

static int kind = NONE;
static long first = 0;  // the number of the call that fails, from 1; 0: none, only count
static atomic_long calls = 0;
static char folder[PATH_MAX] = "";
static time_t jump = 0;

void arm(int armed, long call, const char *below, long seconds) {
    calls = 0;
    first = call;
    jump = seconds;
    strncpy(folder, below, sizeof folder - 1);
    kind = armed;
}

long counted(void) { return calls; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__) = NULL; \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int is_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    size_t wanted = strlen(folder);
    return length > 0 && (size_t)length >= wanted && !strncmp(path, folder, wanted);
}

// Whether this call, of the armed kind, is to fail. A full disk stays full.
static int is_due(void) {
    long call = atomic_fetch_add(&calls, 1) + 1;
    return first && (kind == FULL || kind == CLOCK ? call >= first : call == first);
}

static int is_written(int descriptor) {
    return (kind == FULL || kind == WRITE) && is_below(descriptor) && is_due();
}

static int failure(void) {
    errno = kind == FULL ? ENOSPC : EIO;
    return -1;
}

static size_t cut(int descriptor, size_t size) {
    if (kind != SHORT || size < 2 || !is_below(descriptor)) return size;
    atomic_fetch_add(&calls, 1);
    return first ? (size + 1) / 2 : size;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (is_written(descriptor)) return failure();
    return real(descriptor, data, cut(descriptor, size));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (is_written(descriptor)) return failure();
    return real(descriptor, data, cut(descriptor, size), at);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) {
    return pwrite64(descriptor, data, size, at);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (is_written(descriptor)) return failure();
    return real(descriptor, parts, count);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *);
    if (kind != NONE && is_written(fileno(file))) return failure(), 0;
    return real(data, size, count, file);
}

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    return is_written(descriptor) ? failure() : real(descriptor);
}

int ftruncate64(int descriptor, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return is_written(descriptor) ? failure() : real(descriptor, size);
}

int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

static int is_read(int descriptor) { return kind == READ && is_below(descriptor) && is_due(); }

ssize_t read(int descriptor, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    return is_read(descriptor) ? failure() : real(descriptor, data, size);
}

ssize_t pread64(int descriptor, void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    return is_read(descriptor) ? failure() : real(descriptor, data, size, at);
}

ssize_t pread(int descriptor, void *data, size_t size, off_t at) {
    return pread64(descriptor, data, size, at);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (kind == RENAME && !strncmp(from, folder, strlen(folder)) && is_due()) return failure();
    return real(from, to);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (kind == CLOCK && clock == CLOCK_REALTIME && is_due()) now->tv_sec += jump;
    return result;
}
