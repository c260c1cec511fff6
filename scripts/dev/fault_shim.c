/* Faults at the file operations of a process, between it and the C library: loaded with LD_PRELOAD, armed by
 * fault_arm(). Operations that change files below one folder and operations that read files below another are counted;
 * at a chosen number the process is killed, or the operation fails with an error number. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITES = 0, READS = 1 };

static char roots[2][PATH_MAX];
static long counts[2];
static long target = -1;
static int chosen = WRITES, failure = 0;

/* which: WRITES or READS; at: number of the operation, from 1 (0: none); error: error number, 0 to kill. */
void fault_arm(const char *written, const char *read, int which, long at, int error)
{
    snprintf(roots[WRITES], PATH_MAX, "%s", written);
    snprintf(roots[READS], PATH_MAX, "%s", read);
    counts[WRITES] = counts[READS] = 0;
    chosen = which;
    target = at;
    failure = error;
}

long fault_count(int which) { return counts[which]; }

static int below(int which, int folder, const char *path)
{
    char whole[PATH_MAX];
    if (target < 0 || path == NULL || roots[which][0] == 0)
        return 0;
    if (path[0] != '/') {
        char link[64];
        ssize_t length = 0;
        if (folder == AT_FDCWD) {
            if (getcwd(whole, sizeof whole) != NULL)
                length = (ssize_t)strlen(whole);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = readlink(link, whole, sizeof whole - 1);
        }
        if (length <= 0 || length + 2 >= PATH_MAX)
            return 0;
        snprintf(whole + length, sizeof whole - (size_t)length, "/%s", path);
        path = whole;
    }
    return strncmp(path, roots[which], strlen(roots[which])) == 0;
}

static int opened_below(int which, int handle)
{
    char link[64], path[PATH_MAX];
    if (target < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return below(which, AT_FDCWD, path);
}

/* Count an operation; returns 1 where it must fail, with errno set. */
static int strikes(int which)
{
    long number = __atomic_add_fetch(&counts[which], 1, __ATOMIC_SEQ_CST);
    if (which != chosen || number != target)
        return 0;
    if (failure == 0)
        kill(getpid(), SIGKILL);
    errno = failure;
    return 1;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (real == NULL) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))

static int open_strikes(int folder, const char *path, int flags)
{
    int saved = errno, which = CHANGES(flags) ? WRITES : READS;
    if ((flags & O_DIRECTORY) == 0 && below(which, folder, path) && strikes(which))
        return 1;
    errno = saved;
    return 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list list; \
            va_start(list, flags); \
            mode = va_arg(list, mode_t); \
            va_end(list); \
        } \
        return open_strikes(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) \
    { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list list; \
            va_start(list, flags); \
            mode = va_arg(list, mode_t); \
            va_end(list); \
        } \
        return open_strikes(folder, path, flags) ? -1 : real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define ON_HANDLE(which, type, name, parameters, arguments, handle) \
    type name parameters \
    { \
        REAL(name); \
        return opened_below(which, handle) && strikes(which) ? (type)-1 : real arguments; \
    }
ON_HANDLE(WRITES, ssize_t, write, (int f, const void *b, size_t n), (f, b, n), f)
ON_HANDLE(WRITES, ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o), f)
ON_HANDLE(WRITES, ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), f)
ON_HANDLE(WRITES, ssize_t, writev, (int f, const struct iovec *v, int n), (f, v, n), f)
ON_HANDLE(WRITES, int, fsync, (int f), (f), f)
ON_HANDLE(WRITES, int, fdatasync, (int f), (f), f)
ON_HANDLE(WRITES, int, ftruncate, (int f, off_t n), (f, n), f)
ON_HANDLE(WRITES, int, ftruncate64, (int f, off64_t n), (f, n), f)
ON_HANDLE(READS, ssize_t, read, (int f, void *b, size_t n), (f, b, n), f)
ON_HANDLE(READS, ssize_t, pread, (int f, void *b, size_t n, off_t o), (f, b, n, o), f)
ON_HANDLE(READS, ssize_t, pread64, (int f, void *b, size_t n, off64_t o), (f, b, n, o), f)
ON_HANDLE(READS, void *, mmap, (void *a, size_t n, int p, int g, int f, off_t o), (a, n, p, g, f, o), f)
ON_HANDLE(READS, void *, mmap64, (void *a, size_t n, int p, int g, int f, off64_t o), (a, n, p, g, f, o), f)

#define ON_PATH(name, parameters, arguments, folder, path) \
    int name parameters \
    { \
        REAL(name); \
        return below(WRITES, folder, path) && strikes(WRITES) ? -1 : real arguments; \
    }
ON_PATH(rename, (const char *a, const char *b), (a, b), AT_FDCWD, b)
ON_PATH(renameat, (int f, const char *a, int g, const char *b), (f, a, g, b), g, b)
ON_PATH(renameat2, (int f, const char *a, int g, const char *b, unsigned int h), (f, a, g, b, h), g, b)
ON_PATH(unlink, (const char *a), (a), AT_FDCWD, a)
ON_PATH(unlinkat, (int f, const char *a, int h), (f, a, h), f, a)
ON_PATH(rmdir, (const char *a), (a), AT_FDCWD, a)
ON_PATH(mkdir, (const char *a, mode_t m), (a, m), AT_FDCWD, a)
ON_PATH(mkdirat, (int f, const char *a, mode_t m), (f, a, m), f, a)
ON_PATH(truncate, (const char *a, off_t n), (a, n), AT_FDCWD, a)
ON_PATH(truncate64, (const char *a, off64_t n), (a, n), AT_FDCWD, a)
ON_PATH(chmod, (const char *a, mode_t m), (a, m), AT_FDCWD, a)
ON_PATH(symlink, (const char *a, const char *b), (a, b), AT_FDCWD, b)
