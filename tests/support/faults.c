/* Loaded before the C library (LD_PRELOAD) by tests/main/faults/preload.rs: makes its file calls fail, come short or be
 * interrupted. FAULTS_MODE is error, short, interrupt or none; FAULTS_SEED picks which calls. Calls on descriptors 0 to 2
 * and on what is no regular file are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static _Atomic uint64_t calls;

static char mode(void) {
    const char *text = getenv("FAULTS_MODE");
    return text ? text[0] : 'n';
}

/* One call in `odds`, by its number and the seed. */
static int chosen(uint64_t odds) {
    const char *seed = getenv("FAULTS_SEED");
    uint64_t z = atomic_fetch_add(&calls, 1) * 0x9e3779b97f4a7c15ull + (seed ? strtoull(seed, 0, 10) : 0) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) % odds == 0;
}

static int regular(int fd) {
    struct stat found;
    return fd > 2 && fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
}

/* 1: the call fails with errno set. */
static int fails(int fd, int error) {
    if (!regular(fd)) return 0;
    if (mode() == 'e' && chosen(120)) return errno = error, 1;
    if (mode() == 'i' && chosen(2)) return errno = EINTR, 1;
    return 0;
}

static size_t shortened(int fd, size_t count) {
    return mode() == 's' && count > 1 && regular(fd) && chosen(2) ? count / 2 : count;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t pread64(int fd, void *buffer, size_t count, off64_t offset) {
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    return fails(fd, EIO) ? -1 : real(fd, buffer, shortened(fd, count), offset);
}

ssize_t read(int fd, void *buffer, size_t count) {
    REAL(ssize_t, "read", int, void *, size_t);
    if (mode() == 'e') return real(fd, buffer, count); /* configs and headers: bad input, tested elsewhere */
    return fails(fd, EIO) ? -1 : real(fd, buffer, shortened(fd, count));
}

ssize_t pwrite64(int fd, const void *buffer, size_t count, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    return fails(fd, ENOSPC) ? -1 : real(fd, buffer, shortened(fd, count), offset);
}

ssize_t write(int fd, const void *buffer, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return fails(fd, EIO) ? -1 : real(fd, buffer, shortened(fd, count));
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    return mode() == 'e' && chosen(120) ? (errno = EIO, -1) : real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return mode() == 'e' && chosen(120) ? (errno = EIO, -1) : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return mode() == 'e' && chosen(120) ? (errno = EIO, -1) : real(from, to);
}
